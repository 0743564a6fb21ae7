"""Arrays of an .npz file. Members stored without compression are mapped from the file, compressed ones are read.

Never unpickles: an array of objects is refused.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from strategies.data.dataset import Array
from strategies.data.source import unusable

_LOCAL_HEADER_BYTES = 30


def read_npz(path: Path, where: str) -> dict[str, Array]:
    """Every array by name; mapped read-only where possible. Raises SpecError for anything else than arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            return {member.filename.removesuffix(".npy"): _member(path, archive, member, where) for member in members}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError, NotImplementedError, OSError) as error:
        raise unusable(
            f"{where}: not a readable .npz file: {error}", "write it again with numpy.savez(file, x=..., y=...)"
        ) from None


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> Array:
    with archive.open(member) as file:
        shape, fortran, dtype, header_bytes = _header(file)
        if dtype.hasobject:
            raise unusable(
                f"{where}: array {member.filename!r} holds Python objects, which are never loaded",
                "save numbers: numpy.asarray(values, dtype='float32')",
            )
        count = int(np.prod(shape, dtype=np.int64))
        if member.file_size != header_bytes + count * dtype.itemsize:
            raise ValueError(f"{member.filename} is {member.file_size} bytes, its header says otherwise")
        order = "F" if fortran else "C"
        if member.compress_type == zipfile.ZIP_STORED and count:
            with path.open("rb") as raw:
                offset = _data_offset(raw, member) + header_bytes
            return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
        content = file.read()
    return np.frombuffer(content, dtype, count).reshape(shape, order=order)  # type: ignore[call-overload, no-any-return]


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    npy: Any = np.lib.format
    version = npy.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = npy.read_array_header_2_0(file)
    else:
        raise ValueError(f"npy version {version} is not for plain arrays")
    if any(size < 0 for size in shape):
        raise ValueError("a negative shape")
    return shape, fortran, dtype, file.tell()


def _data_offset(file: IO[bytes], member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: the lengths in its local header may differ from those in the directory."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{member.filename} has no local header")
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return member.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
