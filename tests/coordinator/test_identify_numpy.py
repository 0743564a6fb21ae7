"""Arrays of numpy: named and measured, never called parameters; pickled objects are refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire import cut_everywhere, outcome

from coordinator.identify import archive_readers, numpy_file
from protos.errors import SpecError
from protos.model import ModelProfile


def npy(array: np.ndarray, **more: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **more)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def read_npy(content: bytes) -> ModelProfile:
    return numpy_file.read_npy(io.BytesIO(content), len(content))


def read_npz(content: bytes) -> ModelProfile:
    return archive_readers.read(io.BytesIO(content), len(content))


def header(text: str, data: bytes = b"", version: int = 1) -> bytes:
    return (
        b"\x93NUMPY"
        + bytes((version, 0))
        + len(text).to_bytes(2 if version == 1 else 4, "little")
        + text.encode()
        + data
    )


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.zeros((3, 4), np.float16), "F16"),
        (np.zeros((2, 1, 5), ">f8"), "F64"),
        (np.asfortranarray(np.zeros((3, 4), np.int32)), "I32"),
        (np.array(3), "I64"),
        (np.zeros((0, 7), bool), "BOOL"),
        (np.array(["ab", "c"]), "text"),
        (np.array(["2020-01-01"], "M8[D]"), "time"),
        (np.zeros(3, [("a", "<f4"), ("b", "<i8", (2,))]), "records"),
    ],
)
def test_an_array_is_named_by_type_and_shape(array: np.ndarray, dtype: str) -> None:
    profile = read_npy(npy(array))
    assert (profile.framework, profile.format, profile.parameters) == ("numpy", "npy", 0)
    assert profile.dtypes == (dtype,)
    assert [layer.output_shape for layer in profile.layers] == [array.shape]
    assert "parameters" in profile.unknown and not profile.trainable
    assert f"{array.size} elements in all; nothing says whether they are parameters" in profile.notes[0]


def test_an_archive_lists_its_arrays() -> None:
    profile = read_npz(npz(w=np.zeros((30, 40)), labels=np.arange(5, dtype=np.int16)))
    assert (profile.format, profile.parameters, profile.dtypes) == ("npz", 0, ("F64", "I16"))
    assert {layer.name: (layer.kind, layer.output_shape) for layer in profile.layers} == {
        "w": ("array of F64", (30, 40)),
        "labels": ("array of I16", (5,)),
    }
    assert "2 arrays with 1205 elements" in profile.notes[0]
    assert "hive trains a Python entry point" in profile.why_not


class _Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


def test_pickled_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    content = npy(np.array([_Payload(tmp_path / "executed")], dtype=object), allow_pickle=True)
    with pytest.raises(SpecError, match="pickled Python objects"):
        read_npy(content)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("a.npy", content)
    with pytest.raises(SpecError, match="pickled Python objects"):
        read_npz(archive.getvalue())
    records = np.zeros(1, dtype=[("n", "i4"), ("o", "O")])
    with pytest.raises(SpecError, match="pickled Python objects"):
        read_npy(npy(records, allow_pickle=True))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npy(np.zeros(8))[:-1], "says 64 bytes"),
        (npy(np.zeros(8)) + b"x", "says 64 bytes"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999999,), }"), "impossible shape"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }"), "not one of numpy's"),
        (header("__import__('os').system('x')"), "not one of numpy's"),
        (header("{" * 60_000, version=2), "not one of numpy's"),
        (header("[" * 60_000, version=2), "not one of numpy's"),
        (b"\x93NUMPY\x02\x00" + b"\xff" * 4, "does not fit"),
        (b"\x93NUMPY\x09\x00" + bytes(40), "no header"),
        (b"\x93NUMPY", "no header"),
    ],
)
def test_lies_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        read_npy(content)


def test_a_member_that_is_no_array_and_a_bomb_are_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(1 << 24))
    with pytest.raises(SpecError, match="no header"):
        read_npz(file.getvalue())


def test_files_cut_anywhere_give_the_typed_error() -> None:
    assert cut_everywhere(numpy_file.read_npy, npy(np.zeros((3, 4), np.float32))) == []
    assert cut_everywhere(archive_readers.read, npz(a=np.zeros(3), b=np.ones(2)), step=7) == []


@settings(max_examples=150)
@given(st.sampled_from(["npy", "npz"]), st.data())
def test_damaged_files_give_a_profile_or_the_typed_error(kind: str, data: st.DataObject) -> None:
    content = bytearray(npy(np.zeros(3)) if kind == "npy" else npz(a=np.zeros(3)))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    outcome(numpy_file.read_npy if kind == "npy" else archive_readers.read, bytes(content))
