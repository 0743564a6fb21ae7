"""Damaged and hostile bytes: the parser answers with a profile or with MODEL_UNUSABLE, whatever it is given."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from coordinator.identify import child, parse, pickle_walk
from protos.errors import ErrorCode, SpecError
from protos.model import ModelProfile


def identify(content: bytes) -> ModelProfile | SpecError:
    try:
        return parse.identify(io.BytesIO(content))
    except SpecError as error:
        assert error.code is ErrorCode.MODEL_UNUSABLE
        assert error.message
        return error


def torch_bytes(value: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
MAGIC = [b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x08\x07\x12", b"GGUF", b"\x10\0\0\0\0\0\0\0{"]
STATE = {"a.weight": torch.zeros(4, 3), "a.bias": torch.zeros(4), "b.steps": torch.zeros(1, dtype=torch.int64)}
VALID = {
    "safetensors": save(STATE),
    "zip": torch_bytes(STATE),
    "legacy": torch_bytes(STATE, zipped=False),
    "module": torch_bytes(nn.Linear(3, 4)),
    "python": b"def build():\n    return 1\n",
}


@given(st.binary(max_size=400))
def test_random_bytes(content: bytes) -> None:
    identify(content)


@given(st.sampled_from(MAGIC), st.binary())
def test_random_bytes_after_a_magic_number(magic: bytes, content: bytes) -> None:
    identify(magic + content)


@settings(max_examples=300)
@given(st.sampled_from(sorted(VALID)), st.data())
def test_mutated_files(name: str, data: st.DataObject) -> None:
    content = bytearray(VALID[name])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    identify(bytes(content))


@given(st.sampled_from(["safetensors", "zip", "legacy"]), st.data())
def test_truncated_files_never_pass(name: str, data: st.DataObject) -> None:
    content = VALID[name]
    length = data.draw(st.integers(0, len(content) - 1))
    found = identify(content[:length])
    assert isinstance(found, SpecError) or not parse.WEIGHT_FORMATS & {found.format}


@settings(max_examples=300)
@given(st.lists(st.sampled_from(OPCODES), max_size=60))
def test_random_opcodes(codes: list[bytes]) -> None:
    with contextlib.suppress(SpecError):
        pickle_walk.walk(io.BytesIO(b"\x80\x04" + b"".join(codes) + b"."))


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape if shape is not None else [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlap or leave a hole"),
        (safetensors_bytes({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), "overlap or leave a hole"),
        (safetensors_bytes({"a": entry(0, 8)}, bytes(12)), "lists 8 bytes of data, the file has 12"),
        (safetensors_bytes({"a": entry(0, 8)}, bytes(4)), "lists 8 bytes of data, the file has 4"),
        (safetensors_bytes({"a": entry(0, 8, [3])}, bytes(8)), "do not hold"),
        (safetensors_bytes({"a": entry(0, 8, [-2])}, bytes(8)), "impossible shape"),
        (safetensors_bytes({"a": entry(0, 8, [2.0])}, bytes(8)), "impossible shape"),
        (safetensors_bytes({"a": entry(0, 8, [True, 2])}, bytes(8)), "impossible shape"),
        (safetensors_bytes({"a": entry(8, 0, [2])}, bytes(8)), "do not hold"),
        (safetensors_bytes({"a": entry(0, 8, dtype="F31")}, bytes(8)), "unknown type"),
        (safetensors_bytes({"a": {"dtype": "F32"}}), "expected dtype, shape and data_offsets"),
        (safetensors_bytes(b'{"a": 1, "a": 2}'), "twice"),
        (safetensors_bytes(b"{" * 100_000), "not valid JSON"),
        (safetensors_bytes(b'{"a":' * 50_000), "not valid JSON"),
        (safetensors_bytes({"__metadata__": {}}), "no tensors"),
        ((10_000).to_bytes(8, "little") + b"{" + bytes(100), "does not fit"),
    ],
)
def test_lying_safetensors_headers(content: bytes, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse.identify(io.BytesIO(content))


def test_a_tensor_may_not_claim_more_than_is_stored() -> None:
    claim = torch.zeros(1).expand(1 << 34)
    found = identify(torch_bytes({"weight": claim}))
    assert isinstance(found, SpecError)
    assert "claims more than" in found.message


def test_tensor_data_missing_from_the_archive() -> None:
    source = zipfile.ZipFile(io.BytesIO(VALID["zip"]))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for item in source.infolist():
            if not item.filename.endswith("data/0"):
                archive.writestr(item.filename, source.read(item))
    found = identify(target.getvalue())
    assert isinstance(found, SpecError)
    assert "missing from the archive" in found.message


def test_compressed_tensor_data_are_refused() -> None:
    source = zipfile.ZipFile(io.BytesIO(VALID["zip"]))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for item in source.infolist():
            archive.writestr(item.filename, source.read(item))
    found = identify(target.getvalue())
    assert isinstance(found, SpecError)
    assert "compressed" in found.message


@pytest.mark.parametrize(
    "name",
    ["mymodel.Net", "builtins.getattr", "torch.nn.modules.linear.Linear", "torch._utils._rebuild_sparse_tensor"],
)
def test_only_the_allow_list_is_known(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    named = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."
    stacked = (
        pickle.PROTO
        + b"\x04"
        + b"".join(pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, attribute))
    )
    for content in (named, stacked + pickle.STACK_GLOBAL + b"."):
        assert list(pickle_walk.walk(io.BytesIO(content)).foreign) == [name]


def test_the_child_is_confined_and_light() -> None:
    root = str(Path(child.__file__).parents[2])
    check = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from coordinator.identify import child\n"
        "child.confine()\n"
        "assert not {'torch', 'numpy', 'pydantic', 'asyncio'} & set(sys.modules), sorted(sys.modules)\n"
        "try:\n"
        "    bytearray(1 << 31)\n"
        "except MemoryError:\n"
        "    sys.exit(0)\n"
        "sys.exit(9)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", check, root], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
