"""The index of a TensorFlow checkpoint (variables.index): names, types and shapes of variables; no variable is read.

Owns the table that the index is (LevelDB's: blocks of entries that share beginnings of keys, a checksum after each, a
footer that says where the list of blocks is) and the message in each entry. Blocks are checked before they are used;
compressed ones, which TensorFlow has never written here by itself, are refused. Source: LevelDB's doc/table_format.md,
TensorFlow's tensor_bundle.proto.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from coordinator.identify.protobuf_wire import Message, open_message
from coordinator.identify.tensors import MAX_NAME_CHARACTERS, MAX_TENSORS, check_shape, unusable
from protos.errors import SpecError

MAX_INDEX_BYTES = 16 * 1024 * 1024
_FOOTER_BYTES = 48
_MAGIC = 0xDB4775248B80FB57
_DAMAGED = "the checkpoint's index is damaged or was cut short: copy the directory again"
DTYPES = {
    1: "F32", 2: "F64", 3: "I32", 4: "U8", 5: "I16", 6: "I8", 7: "STRING", 8: "C64", 9: "I64", 10: "BOOL", 11: "I8",
    12: "U8", 13: "I32", 14: "BF16", 15: "I16", 16: "U16", 17: "U16", 18: "C128", 19: "F16", 20: "RESOURCE",
    21: "VARIANT", 22: "U32", 23: "U64", 24: "F8_E5M2", 25: "F8_E4M3", 29: "I4", 30: "U4",
}  # fmt: skip
_ITEM_BYTES = {
    "F32": 4, "F64": 8, "I32": 4, "U8": 1, "I16": 2, "I8": 1, "C64": 8, "I64": 8, "BOOL": 1, "BF16": 2, "U16": 2,
    "C128": 16, "F16": 2, "U32": 4, "U64": 8, "F8_E5M2": 1, "F8_E4M3": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Variable:
    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_index(file: BinaryIO, size: int) -> list[Variable]:
    """The variables that the checkpoint holds, in the order of their names. Raises SpecError (MODEL_UNUSABLE)."""
    if size > MAX_INDEX_BYTES:
        raise _damaged(f"its {size} bytes are over the limit of {MAX_INDEX_BYTES}")
    if size < _FOOTER_BYTES:
        raise _damaged(f"it has {size} bytes")
    file.seek(0)
    content = file.read(size)
    footer = content[-_FOOTER_BYTES:]
    if len(content) != size or int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise _damaged("its last bytes are not those of a table")
    at = 0
    for _ in range(2):  # the list of other lists, which is empty
        _, at = _varint(footer, at)
    start, at = _varint(footer, at)
    length, at = _varint(footer, at)
    found: list[Variable] = []
    seen = 0
    for _, handle in _entries(_block(content, start, length)):
        place, after = _varint(handle, 0)
        count, _ = _varint(handle, after)
        seen += count + 5
        if seen > size:
            raise _damaged("it lists more blocks than it has room for")
        for key, value in _entries(_block(content, place, count)):
            if not key:
                _check_header(value)
            elif key[0]:  # a key that starts with a zero is a slice of a variable that is listed whole as well
                found.append(_variable(key, value))
        if len(found) > MAX_TENSORS:
            raise _damaged(f"more than {MAX_TENSORS} variables")
    return found


def _block(content: bytes, start: int, length: int) -> bytes:
    """The bytes of a block, whose kind and checksum follow it."""
    if start + length + 5 > len(content):
        raise _damaged("a block lies outside the file")
    kind = content[start + length]
    stated = int.from_bytes(content[start + length + 1 : start + length + 5], "little")
    if masked(crc32c(content[start : start + length + 1])) != stated:
        raise _damaged("a block's checksum is wrong")
    if kind != 0:
        raise unusable("the checkpoint's index is compressed, as TensorFlow never writes it", "save the model again")
    return content[start : start + length]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values; a key is written without what it shares with the one before."""
    if len(block) < 4:
        raise _damaged("a block is too short")
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")
    if end < 0:
        raise _damaged("a block has more entry points than room")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        fresh, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + fresh + length > end or shared + fresh > 4 * MAX_NAME_CHARACTERS:
            raise _damaged("an entry reaches beyond its block")
        key = key[:shared] + block[at : at + fresh]
        yield key, block[at + fresh : at + fresh + length]
        at += fresh + length


def _check_header(value: bytes) -> None:
    """BundleHeaderProto: how many shards, which byte order, which version."""
    for entry in _message(value):
        if entry.number == 1 and not 0 <= entry.signed <= 100_000:
            raise _damaged("it has an impossible number of shards")


def _variable(key: bytes, value: bytes) -> Variable:
    name = key.decode("utf-8", "replace")
    dtype, shape, size = "", list[object](), 0
    for entry in _message(value):
        match entry.number:
            case 1:
                dtype = DTYPES.get(entry.unsigned % 100, "")  # 100 more: a reference
            case 2:
                shape = list(dimensions(entry.message()))
            case 5:
                size = entry.signed
    if not dtype:
        raise _damaged(f"{name[:80]!r} has an unknown type")
    variable = Variable(name, dtype, check_shape(name, shape), size)
    item = _ITEM_BYTES.get(dtype)
    if item is not None and size not in (variable.elements * item, 0):  # 0: stored in slices
        raise _damaged(f"{name[:80]!r} of {variable.elements * item} bytes is listed with {size}")
    return variable


def dimensions(message: Message) -> Iterator[int]:
    """The sizes in a TensorShapeProto; -1 for one that is open."""
    for entry in message:
        if entry.number == 2:
            size = 0  # a zero is not written
            for part in entry.message():
                size = part.signed if part.number == 1 else size
            yield size


def _message(content: bytes) -> Message:
    return open_message(io.BytesIO(content), len(content))


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(content) and shift < 64:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _damaged("a number in it has no end")


def _table() -> tuple[int, ...]:
    found = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
        found.append(number)
    return tuple(found)


_CRC32C = _table()


def crc32c(content: bytes) -> int:
    """CRC-32C (Castagnoli), which Python's libraries do not have."""
    value, table = 0xFFFF_FFFF, _CRC32C
    for byte in content:
        value = value >> 8 ^ table[(value ^ byte) & 0xFF]
    return value ^ 0xFFFF_FFFF


def masked(checksum: int) -> int:
    """As LevelDB stores it, so that a checksum of checksums stays one."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFF_FFFF


def _damaged(why: str) -> SpecError:
    return unusable(f"the checkpoint's index is damaged: {why}", _DAMAGED)
