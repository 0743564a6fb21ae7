"""numpy's .npy and .npz: names, types and shapes of arrays. Whether they are weights, nobody says.

Owns the header of an array (format versions 1 to 3), read as text by a grammar of its own. Arrays of Python objects are
pickles and are refused. Elements are never called parameters.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, replace
from typing import BinaryIO

from coordinator.identify.archive import Archive
from coordinator.identify.tensors import (
    MAX_LAYERS_LISTED,
    MAX_NAME_CHARACTERS,
    WHAT_HIVE_TRAINS,
    check_shape,
    foreign,
    unusable,
)
from protos.model import LayerProfile, ModelProfile
from protos.printable import printable

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 64 * 1024
MAX_ARRAYS = 20_000
WHY_NOT = f"arrays without a model: use them as data.source. {WHAT_HIVE_TRAINS}"
_DAMAGED = "the file is damaged or was cut short: write it again with numpy.save or numpy.savez"
_OBJECTS = "save numbers, not Python objects: numpy.save(PATH, array, allow_pickle=False)"
_SIMPLE = re.compile(
    r"\{\s*'descr':\s*'(?P<order>[<>|=]?)(?P<kind>[a-zA-Z])(?P<size>\d{0,9})(?P<unit>\[[\w /]*\])?',"
    r"\s*'fortran_order':\s*(?:True|False),\s*'shape':\s*\((?P<shape>[\d, L]*)\),?\s*\}\s*"
)
_STRUCTURED = re.compile(
    r"\{\s*'descr':\s*(?P<fields>\[.*\]),\s*'fortran_order':\s*(?:True|False),"
    r"\s*'shape':\s*\((?P<shape>[\d, L]*)\),?\s*\}\s*",
    re.DOTALL,
)
_OBJECT_FIELD = re.compile(r"'[<>|=]?O\d*'")
_NAMES = {
    "f2": "F16", "f4": "F32", "f8": "F64", "f16": "F128", "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64", "u1": "U8",
    "u2": "U16", "u4": "U32", "u8": "U64", "b1": "BOOL", "c8": "C64", "c16": "C128",
}  # fmt: skip
_KINDS = {"U": "text", "S": "text", "M": "time", "m": "duration", "V": "bytes"}


@dataclass(frozen=True, slots=True)
class _Array:
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int | None  # of its data; None when records are stored

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_npy(file: BinaryIO, size: int) -> ModelProfile:
    """The profile of one array. Raises SpecError (MODEL_UNUSABLE)."""
    file.seek(0)
    return _profile("npy", size, [_array("", file.read(MAX_HEADER_BYTES + 12), size)])


def is_npz(names: frozenset[str]) -> bool:
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(archive: Archive) -> ModelProfile:
    """The profile of arrays in a zip archive; only their headers are unpacked. Raises SpecError (MODEL_UNUSABLE)."""
    if len(archive.entries) > MAX_ARRAYS:
        raise unusable(f"{len(archive.entries)} arrays are over the limit of {MAX_ARRAYS}")
    arrays = []
    for name, entry in archive.entries.items():
        if len(name) > MAX_NAME_CHARACTERS:
            raise unusable(f"an array's name is over the limit of {MAX_NAME_CHARACTERS} characters", _DAMAGED)
        arrays.append(_array(name.removesuffix(".npy"), _head(archive, name), entry.file_size))
    return _profile("npz", archive.size, arrays)


def array_in(archive: Archive, name: str) -> tuple[str, tuple[int, ...]]:
    """Type and shape of one array of an archive of another kind. Raises SpecError (MODEL_UNUSABLE)."""
    if name not in archive.entries:
        raise unusable(f"the array {name[:80]!r} is missing from the archive", _DAMAGED)
    array = _array(name, _head(archive, name), archive.entries[name].file_size)
    return array.dtype, array.shape


def _head(archive: Archive, name: str) -> bytes:
    try:
        with archive.zip.open(name) as part:
            return part.read(MAX_HEADER_BYTES + 12)
    except Exception as error:  # zipfile raises a dozen kinds for damaged members; all mean the same to the user
        if isinstance(error, MemoryError):
            raise
        raise unusable(f"{name[:80]} in the archive is damaged", _DAMAGED) from None


def _array(name: str, head: bytes, size: int) -> _Array:
    """From the first bytes of a file of `size` bytes."""
    if len(head) < 12 or not head.startswith(MAGIC) or head[6] not in (1, 2, 3):
        raise unusable(f"the array {name[:80]!r} has no header of numpy's", _DAMAGED)
    start = 10 if head[6] == 1 else 12
    length = struct.unpack("<H" if start == 10 else "<I", head[8:start])[0]
    if length > MAX_HEADER_BYTES or start + length > len(head):
        raise unusable(f"the header of the array {name[:80]!r} of {length} bytes does not fit", _DAMAGED)
    text = head[start : start + length].decode("utf-8" if head[6] == 3 else "latin-1", "replace")
    found = _SIMPLE.fullmatch(text)
    if found is not None and found["kind"] != "O":
        shape = _shape(name, found["shape"])
        item = int(found["size"] or 1) * (4 if found["kind"] == "U" else 1)
        dtype = _NAMES.get(f"{found['kind']}{found['size']}") or _KINDS.get(found["kind"], found["kind"])
        array = _Array(name, dtype, shape, math.prod(shape) * item)
        if start + length + math.prod(shape) * item != size:
            raise unusable(
                f"the array {name[:80]!r} says {array.bytes} bytes of data, the file has {size - start - length}",
                _DAMAGED,
            )
        return array
    records = _STRUCTURED.fullmatch(text)
    if found is not None or (records is not None and _OBJECT_FIELD.search(records["fields"])):
        raise unusable(f"the array {name[:80]!r} holds pickled Python objects, which hive never unpickles", _OBJECTS)
    if records is None:
        raise unusable(f"the header of the array {name[:80]!r} is not one of numpy's", _DAMAGED)
    return _Array(name, "records", _shape(name, records["shape"]), None)


def _shape(name: str, text: str) -> tuple[int, ...]:
    sizes = [part.strip().removesuffix("L") for part in text.split(",") if part.strip()]
    if not all(size.isdigit() and len(size) < 20 for size in sizes):
        raise unusable(f"the array {name[:80]!r} has an impossible shape", _DAMAGED)
    return check_shape(name, [int(size) for size in sizes])


def _profile(file_format: str, size: int, arrays: list[_Array]) -> ModelProfile:
    total = sum(array.elements for array in arrays)
    layers = tuple(map(_layer, arrays[:MAX_LAYERS_LISTED]))
    what = "1 array" if len(arrays) == 1 else f"{len(arrays)} arrays"
    note = f"{what} with {total} elements in all; nothing says whether they are parameters, data or results"
    profile = foreign("numpy", file_format, size, f"{what}: {WHY_NOT}")
    dtypes = tuple(sorted({array.dtype for array in arrays}))
    return replace(profile, layers=layers, dtypes=dtypes, notes=(note,), confidence=0.9)


def _layer(array: _Array) -> LayerProfile:
    name = printable(array.name)[:MAX_NAME_CHARACTERS]
    return LayerProfile(name or "array", f"array of {array.dtype}", 0, 0.0, 0.0, 0.0, array.shape)
