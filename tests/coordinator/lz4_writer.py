"""LZ4 frames as joblib's library would write them, in plain Python: none that writes them is installed."""

from __future__ import annotations

import struct

from coordinator.identify import lz4_frame

_FARTHEST = 65_535
_SHORTEST = 4
_LAST_LITERALS = 5
_LAST_COPY = 12  # from here to the end of a block no copy begins


def lz4(data: bytes, block_bytes: int = 65_536, *, linked: bool = False, checked: bool = False) -> bytes:
    """Every other block packed. `linked`: blocks copy from those before; `checked`: sizes and (false) checksums."""
    flags = 0x40 | (0 if linked else 0x20) | (0x1C if checked else 0)
    frame = bytearray(lz4_frame.MAGIC + bytes([flags, 0x40]))
    frame += (struct.pack("<Q", len(data)) if checked else b"") + b"\0"
    for number, start in enumerate(range(0, len(data), block_bytes)):
        block = data[start : start + block_bytes]
        if number % 2:
            frame += struct.pack("<I", len(block) | 1 << 31) + block
        else:
            packed = _packed(block, data[max(0, start - _FARTHEST) : start] if linked else b"")
            frame += struct.pack("<I", len(packed)) + packed
        frame += bytes(4) if checked else b""
    return bytes(frame + bytes(8 if checked else 4))


def _packed(block: bytes, before: bytes) -> bytes:
    """Literals, and copies of the last place where the same four bytes were."""
    data = before + block
    last = {data[at : at + _SHORTEST]: at for at in range(len(before))}
    made = bytearray()
    start = at = len(before)
    while at < len(data) - _LAST_COPY:
        word = data[at : at + _SHORTEST]
        back, last[word] = at - last.get(word, -_FARTHEST - 1), at
        if back > _FARTHEST:
            at += 1
            continue
        end = at + _SHORTEST
        while end < len(data) - _LAST_LITERALS and data[end] == data[end - back]:
            end += 1
        made += _sequence(data[start:at], back, end - at)
        start = at = end
    return bytes(made + _sequence(data[start:]))


def _sequence(literals: bytes, back: int = 0, length: int = 0) -> bytes:
    copied = max(0, length - _SHORTEST)
    token = bytes([min(len(literals), 15) << 4 | min(copied, 15)])
    copy = struct.pack("<H", back) + _more(copied) if back else b""
    return token + _more(len(literals)) + literals + copy


def _more(length: int) -> bytes:
    return b"" if length < 15 else b"\xff" * ((length - 15) // 255) + bytes([(length - 15) % 255])
