"""Little-endian numbers of an HDF5 file, read where an address says; outside the file there is nothing to read.

Invariant: no more than MAX_READ_BYTES are ever read, however often structures point at each other.
"""

from __future__ import annotations

from typing import BinaryIO

from coordinator.identify.tensors import unusable
from protos.errors import SpecError

MAX_READ_BYTES = 256 * 1024 * 1024
MAX_PIECE_BYTES = 32 * 1024 * 1024
AGAIN = "copy the file again, or write it again with the program that made it"


def damaged(what: str) -> SpecError:
    return unusable(f"the HDF5 file is damaged or was cut short ({what})", AGAIN)


class FileBytes:
    """`offset_bytes` and `length_bytes` are the widths of addresses and of sizes, as the superblock says."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        self.base = 0
        self.offset_bytes = 8
        self.length_bytes = 8
        self._file = file
        self._read_bytes = 0

    def piece(self, address: int, count: int) -> Piece:
        """So many bytes from an address. Raises SpecError when they are not in the file or are too many."""
        start = self.base + address
        if count > MAX_PIECE_BYTES or start + count > self.size:
            raise damaged(f"{count} bytes at {address}")
        self._read_bytes += count
        if self._read_bytes > MAX_READ_BYTES:
            raise unusable("the HDF5 file points at the same bytes again and again", AGAIN)
        self._file.seek(start)
        data = self._file.read(count)
        if len(data) != count:
            raise damaged(f"{count} bytes at {address}")
        return Piece(data, self)

    def has(self, address: int, count: int) -> bool:
        return self.base + address + count <= self.size

    @property
    def undefined(self) -> int:
        """The address that means "nowhere"."""
        return (1 << (8 * self.offset_bytes)) - 1


class Piece:
    """Bytes with a position. Raises SpecError beyond their end."""

    def __init__(self, data: bytes, file: FileBytes) -> None:
        self.data = data
        self.at = 0
        self._file = file

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise damaged("a structure ends early")
        found = self.data[self.at : end]
        self.at = end
        return found

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def offset(self) -> int:
        return self.number(self._file.offset_bytes)

    def length(self) -> int:
        return self.number(self._file.length_bytes)

    def part(self, count: int) -> Piece:
        return Piece(self.take(count), self._file)

    def expect(self, signature: bytes) -> None:
        if self.take(len(signature)) != signature:
            raise damaged(f"no {signature!a}")

    @property
    def left(self) -> int:
        return len(self.data) - self.at
