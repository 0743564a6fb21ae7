"""Files that lie about what they hold, or ask for more than a machine has: none of them is a model of that size."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import h5py

GIB = 1024**3
_HUGE = (2**47,) * 32
_LAMBDA = {"class_name": "Lambda", "config": {"function": ["4wEAAAAAAAAA", None, None], "function_type": "lambda"}}


def _safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(begin: int, end: int, shape: list[int]) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def _varint(number: int) -> bytes:
    made = b""
    while number > 127:
        made, number = made + bytes([number & 127 | 128]), number >> 7
    return made + bytes([number])


def _field(number: int, value: bytes | int) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _onnx(initializer: bytes, *nodes: bytes) -> bytes:
    graph = b"".join(_field(1, node) for node in nodes) + _field(5, initializer)
    return _field(1, 8) + _field(2, b"x") + _field(7, graph)


def _external(location: bytes, *dimensions: int) -> bytes:
    entry = _field(1, b"location") + _field(2, location)
    return _dimensions(*(dimensions or (4,))) + _field(13, entry) + _field(14, 1)


def _dimensions(*sizes: int) -> bytes:
    """An ONNX tensor of that shape, without its data."""
    return b"".join(_field(1, size) for size in sizes) + _field(2, 1) + _field(8, b"w")


def _zip(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def _twice() -> bytes:
    """Two entries of one name: what is checked need not be what is read."""
    made = bytearray(_zip([("a/data.pkl", pickle.dumps({})), ("a/data.pkX", pickle.dumps({"x": 1}))]))
    return bytes(made.replace(b"data.pkX", b"data.pkl"))


def _overlapping() -> bytes:
    """A thousand entries that all have the bytes of the first."""
    made = _zip([("a/data.pkl", b"\0" * 100_000)], zipfile.ZIP_DEFLATED)
    start = made.index(b"PK\x01\x02")
    entry, end = made[start : made.index(b"PK\x05\x06")], made[made.index(b"PK\x05\x06") :]
    many = b"".join(entry.replace(b"a/data.pkl", b"a/%08d" % number) for number in range(1000))
    return made[:start] + many + end[:8] + struct.pack("<HHI", 1000, 1000, len(many)) + end[16:]


def _shared(levels: int, width: int) -> bytes:
    """Mappings of mappings, each level `width` times the same one: width ** levels entries to whoever follows them."""
    made = b"\x80\x02}q\x00"
    for level in range(1, levels):
        items = b"".join(b"X\x04\0\0\0%04dh%c" % (number, level - 1) for number in range(width))
        made += b"}q%c(" % level + items + b"u"
    return made + b"."


def _doubled(levels: int) -> bytes:
    return b"\x80\x02]q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(levels)) + b"."


def _tensor(shape: bytes, stride: bytes, elements: int) -> bytes:
    """A torch data.pkl of one tensor with that shape and stride over a storage of so many numbers."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu"
    count = b"\x8a\x08" + struct.pack("<q", elements)
    built = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + count + b"tQK\0" + shape + stride
    return b"\x80\x02}X\x01\0\0\0w" + built + b"\x89ccollections\nOrderedDict\n)RtRs."


def _torch(pickled: bytes, data: bytes = bytes(16)) -> bytes:
    return _zip([("a/data.pkl", pickled), ("a/data/0", data), ("a/version", b"3")])


def _number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def _bomb(size: int) -> bytes:
    """A gzip-like stream of zeros, made a piece at a time."""
    packer = zlib.compressobj(9)
    piece = bytes(1 << 20)
    return b"".join(packer.compress(piece) for _ in range(size >> 20)) + packer.flush()


def _gguf(tensors: int, pairs: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def _npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


FILES: Mapping[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "one-byte": lambda: b"\x80",
    "safetensors-huge-header": lambda: struct.pack("<Q", 2**62) + b'{"w":' + bytes(100),
    "safetensors-long-header": lambda: struct.pack("<Q", 10**6) + b"{" + bytes(100),
    "safetensors-overlap": lambda: _safetensors({"a": _entry(0, 8, [2]), "b": _entry(4, 12, [2])}, bytes(12)),
    "safetensors-hole": lambda: _safetensors({"a": _entry(0, 8, [2]), "b": _entry(12, 16, [1])}, bytes(16)),
    "safetensors-product": lambda: _safetensors({"a": _entry(0, 8, [2**40, 2**40])}, bytes(8)),
    "safetensors-negative": lambda: _safetensors({"a": _entry(0, 8, [-2])}, bytes(8)),
    "safetensors-zero-tensors": lambda: _safetensors({f"t{n}": _entry(0, 0, [0]) for n in range(200_001)}),
    "safetensors-deep": lambda: _safetensors(b'{"a":' * 50_000),
    "safetensors-twice": lambda: _safetensors(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}'),
    "zip-twice": _twice,
    "zip-overlapping": _overlapping,
    "zip-bomb": lambda: _zip([("a/data.pkl", bytes(256 << 20))], zipfile.ZIP_DEFLATED),
    "zip-opcodes": lambda: _zip([("a/data.pkl", b"\x80\x02" + b"]" * (15 << 20) + b".")], zipfile.ZIP_DEFLATED),
    "zip-nested": lambda: _zip([("a/data.pkl", _zip([("data.pkl", _zip([("data.pkl", b"\x80\x02N.")]))]))]),
    "zip-two-models": lambda: _zip([("a/data.pkl", b"\x80\x02}."), ("b/data.pkl", b"\x80\x02}.")]),
    "zip-parents": lambda: _zip([("../../data.pkl", b"\x80\x02}."), ("/etc/passwd", b"x")]),
    "zip-lying-sizes": lambda: _torch(b"\x80\x02}.").replace(struct.pack("<II", 16, 16), struct.pack("<II", 9, 2**31)),
    "zip-cut": lambda: _torch(b"\x80\x02}.")[:-30],
    "zip-end-only": lambda: b"PK\x05\x06" + bytes(18),
    "zip-many-names": lambda: _zip([(f"a/{n}", b"") for n in range(20_000)]),
    "torch-stride-zero": lambda: _torch(_tensor(_number(2**40) + b"\x85", b"K\0\x85", 4)),
    "torch-huge-storage": lambda: _torch(_tensor(_number(2**40) + b"\x85", b"K\x01\x85", 2**40)),
    "torch-negative": lambda: _torch(_tensor(_number(-5) + b"\x85", b"K\x01\x85", 4)),
    "torch-missing-data": lambda: _zip([("a/data.pkl", _tensor(b"K\x04\x85", b"K\x01\x85", 4))]),
    "pickle-laughs": lambda: _doubled(200),
    "pickle-shared-mappings": lambda: _torch(_shared(12, 200)),
    "pickle-shared-mappings-bare": lambda: _shared(12, 200),
    "pickle-long-int": lambda: b"\x80\x02\x8b\xff\xff\xff\x7f" + bytes(1000) + b".",
    "pickle-long-text": lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "pickle-long-line": lambda: b"\x80\x02I" + b"9" * 500_000 + b"\n.",
    "pickle-deep": lambda: b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b".",
    "pickle-memo": lambda: b"\x80\x02Nr\xff\xff\xff\x7f.",
    "pickle-no-stop": lambda: pickle.dumps({"a": [1] * 1000}, protocol=4)[:-1],
    "legacy-huge": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + b"\x80\x02N." * 3,
    "zlib-bomb": lambda: _bomb(512 << 20),
    "gguf-counts": lambda: _gguf(2**63 - 1, 2**63 - 1),
    "gguf-string": lambda: _gguf(0, 1, struct.pack("<Q", 2**62) + b"general.name"),
    "gguf-nested-arrays": lambda: _gguf(0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 9, 2**40) * 1000),
    "npy-code": lambda: _npy(b"__import__('os').system('touch canary')\n"),
    "npy-huge": lambda: _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }\n"),
    "npy-deep": lambda: _npy(b"(" * 60_000),
    "onnx-parent": lambda: _onnx(_external(b"../../../../etc/passwd")),
    "onnx-absolute": lambda: _onnx(_external(b"/etc/shadow")),
    "onnx-external-dimensions": lambda: _onnx(_external(b"w.data", *_HUGE)) + _field(8, _field(2, 18)),
    "onnx-missing-dimensions": lambda: _onnx(_dimensions(*_HUGE)) + _field(8, _field(2, 18)),
    "onnx-length": lambda: b"\x08\x08\x3a" + _varint(2**62) + b"x",
    "onnx-endless-varint": lambda: b"\x08\x08\x12" + b"\xff" * 1000,
    "onnx-nested": lambda: _onnx(b"", _nested_graph(300)),
    "onnx-huge-dims": lambda: _onnx(_field(1, 2**62) + _field(1, 2**62) + _field(2, 1) + _field(8, b"w")),
    "hdf5-signature-only": lambda: b"\x89HDF\r\n\x1a\n",
    "hdf5-garbage": lambda: b"\x89HDF\r\n\x1a\n" + b"\xff" * 4000,
    "tflite-garbage": lambda: b"\x20\0\0\0TFL3" + b"\xff" * 1000,
    "json-deep": lambda: b'{"model_type": ' + b"[" * 400_000,
    "json-long-number": lambda: b'{"model_type": "bert", "hidden_size": ' + b"9" * 100_000 + b"}",
    "python-deep": lambda: b"x = " + b"(" * 200_000 + b")" * 200_000,
    "python-sum": lambda: b"x = " + b"1+" * 300_000 + b"1\n",
    "python-lambda-chain": lambda: b"lambda:" * 50_000 + b"0",
    "text-with-coding": lambda: b"# -*- coding: unicode_escape -*-\nx = '\\x41'\n",
    "utf16": lambda: "def build(): pass\n".encode("utf-16"),
}


def _nested_graph(levels: int) -> bytes:
    """A node with an attribute that is a graph with such a node."""
    node = _field(4, b"Identity")
    for _ in range(levels):
        attribute = _field(1, b"body") + _field(6, _field(1, node)) + _field(20, 5)
        node = _field(4, b"If") + _field(5, attribute)
    return node


def _sparse() -> Iterator[tuple[str, bytes]]:
    yield "zeros", b""
    yield "zip", b"PK\x03\x04"
    yield "pickle", b"\x80\x04"
    yield "hdf5", b"\x89HDF\r\n\x1a\n"
    yield "gguf", b"GGUF\x03\0\0\0" + b"\xff" * 16
    yield "onnx", b"\x08\x08\x3a\xff\xff\xff\xff\x0f"
    yield "safetensors", struct.pack("<Q", 10 * GIB) + b"{"


def _hdf5(folder: Path) -> None:
    """What the library itself writes about data elsewhere, and about more data than there are."""
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "data", (4,))
    for name, fill in {
        "external-storage": lambda file: file.create_dataset("w", (4,), "f4", external=[("/etc/passwd", 0, 16)]),
        "external-link": lambda file: file.update({"w": h5py.ExternalLink("/etc/passwd", "/data")}),
        "soft-link-loop": lambda file: file.update({"a": h5py.SoftLink("/b"), "b": h5py.SoftLink("/a")}),
        "virtual": lambda file: file.create_virtual_dataset("w", layout),
        "huge": lambda file: file.create_dataset("w", (1 << 40,), "f8", chunks=(1024,)),
        "code": lambda file: file.attrs.update({"model_config": json.dumps(_LAMBDA)}),
    }.items():
        with h5py.File(folder / f"hdf5-{name}", "w") as file:
            fill(file)
    with h5py.File(folder / "hdf5-hard-link-loop", "w") as file:
        file["group/itself"] = file["/"]


def write(folder: Path) -> None:
    for name, make in FILES.items():
        (folder / name).write_bytes(make())
    _hdf5(folder)
    for name, head in _sparse():
        with (folder / f"sparse-{name}").open("wb") as file:
            file.write(head)
            file.truncate(10 * GIB)
