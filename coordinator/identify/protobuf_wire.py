"""Protocol buffers as they lie in a file: fields are walked where they are, nothing is decoded that nobody asks for.

Owns the wire format (varints, fixed numbers, length-delimited spans) with its bounds: a field lies inside its message,
messages nest at most MAX_DEPTH deep, a file has at most MAX_FIELDS fields that are looked at. Bytes of a span are read
only by `Field.content` and what builds on it, so that a tensor of two gigabytes is stepped over. Groups, which no model
format uses, are refused. Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import BinaryIO

from coordinator.identify.tensors import unusable
from protos.errors import SpecError

MAX_DEPTH = 48
MAX_FIELDS = 1_500_000
MAX_TEXT_BYTES = 4096
MAX_LIST_BYTES = 256 * 1024 * 1024
_WINDOW_BYTES = 64 * 1024
_TOO_LARGE = "it is larger than what hive looks into, or damaged: give the model's source in PyTorch"
_DAMAGED = "the file is damaged or was cut short: copy it again or write it again"


class Wire(IntEnum):
    VARINT = 0
    FIXED64 = 1
    SPAN = 2
    FIXED32 = 5


class _Source:
    """The file through one window of bytes, and how much of the work that it may ask for is done."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.fields = 0
        self.window = b""
        self.window_start = 0

    def byte(self, at: int) -> int:
        index = at - self.window_start
        if not 0 <= index < len(self.window):
            self.file.seek(at)
            self.window, self.window_start, index = self.file.read(_WINDOW_BYTES), at, 0
            if not self.window:
                raise _damaged("it ends inside a field")
        return self.window[index]

    def read(self, at: int, length: int) -> bytes:
        index = at - self.window_start
        if index >= 0 and index + length <= len(self.window):
            return self.window[index : index + length]
        self.file.seek(at)
        found = self.file.read(length)
        if len(found) != length:
            raise _damaged("it ends inside a field")
        return found

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """The number at `at` and the position behind it."""
        value = shift = 0
        while at < end:
            byte = self.byte(at)
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
            shift += 7
            if shift > 63:
                break
        raise _damaged("a number in it has no end")


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message. `value` is the number of a VARINT or fixed field, the position of a SPAN's bytes."""

    source: _Source
    number: int
    wire: Wire
    value: int
    length: int  # of a SPAN, in bytes
    depth: int

    def message(self) -> Message:
        self._want(Wire.SPAN)
        return Message(self.source, self.value, self.value + self.length, self.depth + 1)

    def content(self, limit: int) -> bytes:
        """The bytes of a span; raises SpecError when they are more than `limit`."""
        self._want(Wire.SPAN)
        if self.length > limit:
            raise _too_large(f"has a field of {self.length} bytes, the limit is {limit}")
        return self.source.read(self.value, self.length)

    def text(self, limit: int = MAX_TEXT_BYTES) -> str:
        return self.content(limit).decode("utf-8", "replace")

    @property
    def unsigned(self) -> int:
        self._want(Wire.VARINT)
        return self.value

    @property
    def signed(self) -> int:
        """An int32, int64, bool or enum: negative numbers are written as if they were large."""
        value = self.unsigned
        return value - (1 << 64) if value >> 63 else value

    def integers(self, limit: int) -> list[int]:
        """A repeated integer, packed or not; at most `limit` of them."""
        if self.wire is Wire.VARINT:
            return [self.signed]
        self._want(Wire.SPAN)
        found: list[int] = []
        at, end = self.value, self.value + self.length
        while at < end:
            value, at = self.source.varint(at, end)
            found.append(value - (1 << 64) if value >> 63 else value)
            if len(found) > limit:
                raise _too_large(f"has a list of more than {limit} numbers, the limit")
        return found

    def number_of_integers(self) -> int:
        """How many a packed or single integer field holds; their bytes are looked at in pieces and not kept."""
        if self.wire is Wire.VARINT:
            return 1
        self._want(Wire.SPAN)
        if self.length > MAX_LIST_BYTES:
            raise _too_large(f"has a list of {self.length} bytes, the limit is {MAX_LIST_BYTES}")
        found, at, end = 0, self.value, self.value + self.length
        while at < end:
            piece = self.source.read(at, min(end - at, _WINDOW_BYTES))
            found += len(piece.translate(None, _CONTINUED))
            at += len(piece)
        return found

    @property
    def real(self) -> float:
        """A float (FIXED32) or a double (FIXED64)."""
        if self.wire is Wire.FIXED32:
            return float(struct.unpack("<f", self.value.to_bytes(4, "little"))[0])
        self._want(Wire.FIXED64)
        return float(struct.unpack("<d", self.value.to_bytes(8, "little"))[0])

    def _want(self, wire: Wire) -> None:
        if self.wire is not wire:
            raise _damaged(f"field {self.number} is of another kind than it should be")


_CONTINUED = bytes(range(0x80, 0x100))  # bytes after which a varint goes on


@dataclass(frozen=True, slots=True)
class Message:
    """A span of the file that holds fields."""

    source: _Source
    start: int
    end: int
    depth: int

    def __iter__(self) -> Iterator[Field]:
        source, at, end = self.source, self.start, self.end
        if self.depth > MAX_DEPTH:
            raise _too_large(f"nests messages more than {MAX_DEPTH} deep, the limit")
        while at < end:
            source.fields += 1
            if source.fields > MAX_FIELDS:
                raise _too_large(f"has more than {MAX_FIELDS} fields, the limit")
            tag, at = source.varint(at, end)
            number, kind = tag >> 3, tag & 7
            length = 0
            match kind:
                case Wire.VARINT:
                    value, at = source.varint(at, end)
                case Wire.SPAN:
                    length, value = source.varint(at, end)
                    at = value + length
                case Wire.FIXED32 | Wire.FIXED64:
                    width = 4 if kind == Wire.FIXED32 else 8
                    if at + width > end:
                        raise _damaged("it ends inside a field")
                    value = int.from_bytes(source.read(at, width), "little")
                    at += width
                case _:
                    raise _damaged("it has a field of no known kind")
            if at > end or not 0 < number < 1 << 29:
                raise _damaged("a field reaches beyond its message" if number else "it has a field without number")
            yield Field(source, number, Wire(kind), value, length, self.depth)


def open_message(file: BinaryIO, size: int) -> Message:
    """The message that a whole file is."""
    return Message(_Source(file, size), 0, size, 0)


def _damaged(why: str) -> SpecError:
    return unusable(f"the protocol buffer is damaged: {why}", _DAMAGED)


def _too_large(what: str) -> SpecError:
    """It may be whole, and is more than hive looks at."""
    return unusable(f"the protocol buffer {what}", _TOO_LARGE)
