"""An LZ4 frame unpacked as a stream of blocks, in plain Python: joblib writes them, and no library reads them safely
in a process that may open no file. Checksums are not checked: what is unpacked is itself read as data only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

MAGIC = b"\x04\x22\x4d\x18"
_BLOCK_BYTES = {4: 64 << 10, 5: 256 << 10, 6: 1 << 20, 7: 4 << 20}
_WINDOW_BYTES = 64 * 1024
_SHORTEST_MATCH = 4


def blocks(file: BinaryIO) -> Iterator[bytes]:
    """What the frame at the start of `file` unpacks to. Raises ValueError, EOFError and IndexError for damaged ones."""
    if _exactly(file, 4) != MAGIC:
        raise ValueError("not an LZ4 frame")
    flags, descriptor = _exactly(file, 2)
    largest = _BLOCK_BYTES.get(descriptor >> 4 & 7)
    if flags >> 6 != 1 or largest is None:
        raise ValueError("LZ4 frame header")
    _exactly(file, (8 if flags & 8 else 0) + (4 if flags & 1 else 0) + 1)
    window = b""
    while size := int.from_bytes(_exactly(file, 4), "little"):
        packed = _exactly(file, min(size & 0x7FFFFFFF, largest + 1))
        block = packed if size >> 31 else _block(packed, window, largest)
        if flags & 16:
            _exactly(file, 4)
        yield block
        window = b"" if flags & 32 else (window + block)[-_WINDOW_BYTES:]


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError("cut short")
    return data


def _block(packed: bytes, window: bytes, largest: int) -> bytes:
    """Literals and copies of what came before, at most 64 KiB back."""
    made = bytearray(window)
    limit = len(window) + largest
    at = 0
    while at < len(packed):
        token = packed[at]
        at += 1
        length = token >> 4
        if length == 15:
            length, at = _length(packed, at, length)
        if at + length > len(packed) or len(made) + length > limit:
            raise ValueError("LZ4 literals")
        made += packed[at : at + length]
        at += length
        if at == len(packed):
            break
        back = int.from_bytes(packed[at : at + 2], "little")
        at += 2
        length = token & 15
        if length == 15:
            length, at = _length(packed, at, length)
        length += _SHORTEST_MATCH
        if not 0 < back <= len(made) or len(made) + length > limit:
            raise ValueError("LZ4 copy")
        start = len(made) - back
        if back >= length:
            made += made[start : start + length]
        else:
            pattern = bytes(made[start:])
            made += (pattern * (length // back + 1))[:length]
    return bytes(made[len(window) :])


def _length(packed: bytes, at: int, length: int) -> tuple[int, int]:
    while True:
        more = packed[at]
        at += 1
        length += more
        if more != 255:
            return length, at
