"""joblib's compressed pickles, unpacked on the way: never more than a block at a time, and bounded in all.

Owns which compressions joblib writes (zlib, gzip, bz2, lzma, xz, lz4). A packed file that does not start with a pickle
is none of joblib's and is only named, by first_bytes.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from coordinator.identify import first_bytes, lz4_frame, pickle_file
from coordinator.identify.pickle_walk import walk
from coordinator.identify.tensors import unusable
from protos.model import ModelProfile

MAX_UNPACKED_BYTES = 1 << 30
_BLOCK_BYTES = 1 << 20
_LZMA_MEMORY_BYTES = 128 << 20
_PROTOCOLS = (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")
_BROKEN = (zlib.error, OSError, lzma.LZMAError, EOFError, ValueError, IndexError)
_DAMAGED = "it is damaged or was cut short: write it again with joblib.dump(model, PATH)"


def looks_like(head: bytes, size: int) -> bool:
    """A compression by its magic number; where that is short, what it unpacks to also starts like a pickle."""
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", lz4_frame.MAGIC)):
        return True
    return _unpacker(head) is not None and _begins_like_a_pickle(io.BytesIO(head))


def read(file: BinaryIO, size: int) -> ModelProfile:
    """Raises SpecError for a packed pickle that is damaged or unpacks to more than MAX_UNPACKED_BYTES."""
    file.seek(0)
    if not _begins_like_a_pickle(file):
        refuse_harmful(file)
        return first_bytes.read(file, size)
    file.seek(0)
    return pickle_file.profile(walk(io.BufferedReader(_Unpacked(file), _BLOCK_BYTES)), "joblib", size)


def refuse_harmful(file: BinaryIO) -> None:
    """Raises SpecError for a harmful pickle of any protocol, packed or not, in a file that no reader knows."""
    file.seek(0)
    pickle_file.refuse_harmful(file)
    file.seek(0)
    if _unpacker(file.read(8)) is not None:
        file.seek(0)
        pickle_file.refuse_harmful(io.BufferedReader(_Unpacked(file), _BLOCK_BYTES))


def _begins_like_a_pickle(file: BinaryIO) -> bool:
    unpack = _unpacker(file.read(8))
    file.seek(0)
    try:
        return unpack is not None and next(unpack(file), b"").startswith(_PROTOCOLS)
    except _BROKEN:
        return False


def _unpacker(head: bytes) -> Callable[[BinaryIO], Iterator[bytes]] | None:
    if head[:1] == b"\x78" and len(head) > 1 and (head[0] * 256 + head[1]) % 31 == 0:
        return lambda file: _zlib(file, zlib.MAX_WBITS)
    if head.startswith(b"\x1f\x8b"):
        return lambda file: _zlib(file, zlib.MAX_WBITS | 16)
    if head.startswith(b"BZh"):
        return lambda file: _feed(file, bz2.BZ2Decompressor())
    if head.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
        return lambda file: _feed(file, lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=_LZMA_MEMORY_BYTES))
    return lz4_frame.blocks if head.startswith(lz4_frame.MAGIC) else None


def _zlib(file: BinaryIO, window_bits: int) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(window_bits)
    while not decompressor.eof:
        data = decompressor.unconsumed_tail or file.read(_BLOCK_BYTES)
        if not data:
            return
        if block := decompressor.decompress(data, _BLOCK_BYTES):
            yield block


def _feed(file: BinaryIO, decompressor: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> Iterator[bytes]:
    while not decompressor.eof:
        data = file.read(_BLOCK_BYTES) if decompressor.needs_input else b""
        if not data and decompressor.needs_input:
            return
        if block := decompressor.decompress(data, _BLOCK_BYTES):
            yield block


class _Unpacked(io.RawIOBase):
    """What a packed file unpacks to, block by block."""

    def __init__(self, file: BinaryIO) -> None:
        unpack = _unpacker(file.read(8))
        file.seek(0)
        assert unpack is not None
        self._blocks = unpack(file)
        self._rest = b""
        self._unpacked_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if not self._rest:
            self._rest = self._next()
        part = self._rest[: len(target)]
        self._rest = self._rest[len(part) :]
        target[: len(part)] = part
        return len(part)

    def _next(self) -> bytes:
        try:
            block = next(self._blocks, b"")
        except _BROKEN:
            raise unusable("what is compressed in the file cannot be unpacked", _DAMAGED) from None
        self._unpacked_bytes += len(block)
        if self._unpacked_bytes > MAX_UNPACKED_BYTES:
            raise unusable(f"the file unpacks to more than {MAX_UNPACKED_BYTES} bytes", "save it again uncompressed")
        return block
