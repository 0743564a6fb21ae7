"""The messages in the header of an HDF5 object that say its type, its shape, where its numbers are, and its texts.

Refused by name: numbers or links in other files, and virtual datasets. No such file is ever opened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

from coordinator.identify.hdf5_bytes import FileBytes, Piece, damaged
from coordinator.identify.hdf5_heaps import global_object
from coordinator.identify.tensors import MAX_DIMENSIONS, unusable

MAX_TEXTS = 100_000
_MAX_RATIO = 1100  # what deflate, the filter of h5py, can make of anything
_INSIDE = "write one file with everything in it"


class Kind(IntEnum):
    DATASPACE = 0x01
    LINK_INFO = 0x02
    DATATYPE = 0x03
    LINK = 0x06
    EXTERNAL_FILES = 0x07
    LAYOUT = 0x08
    ATTRIBUTE = 0x0C
    CONTINUATION = 0x10
    SYMBOL_TABLE = 0x11
    ATTRIBUTE_INFO = 0x15


@dataclass(frozen=True, slots=True)
class DataType:
    """`name` is safetensors' where there is one. `text`: "fixed" or "variable" for strings."""

    name: str
    item_bytes: int
    text: str = ""


def data_type(piece: Piece) -> DataType:
    first = piece.number(1)
    bits, size = piece.number(3), piece.number(4)
    match first & 15:
        case 0:
            return DataType(f"{'I' if bits & 8 else 'U'}{size * 8}", size)
        case 1:
            piece.take(5)
            exponent_bits = piece.number(1)
            return DataType("BF16" if size == 2 and exponent_bits == 8 else f"F{size * 8}", size)
        case 3:
            return DataType("text", size, "fixed")
        case 8:
            return DataType("BOOL" if size == 1 else "enum", size)
        case 9 if bits & 15 == 1:
            return DataType("text", size, "variable")
        case other:
            return DataType(f"HDF5 class {other}", size)


def data_space(piece: Piece) -> tuple[int, ...]:
    version, dimensions = piece.number(1), piece.number(1)
    if dimensions > MAX_DIMENSIONS:
        raise damaged(f"{dimensions} dimensions")
    if version == 1:
        piece.take(6)
    elif version == 2:
        piece.take(1)
        if piece.number(1) == 2:
            return (0,)
    else:
        raise damaged("a shape")
    return tuple(piece.length() for _ in range(dimensions))


def check_layout(piece: Piece, file: FileBytes, needed: int, name: str) -> None:
    """Raises SpecError when the numbers of a dataset are not in the file, or not as many as its shape says."""
    version = piece.number(1)
    if version in (1, 2):
        piece.take(1)
        layout = piece.number(1)
        piece.take(5)
        address, stored = (piece.offset(), needed) if layout else (0, needed)
    elif version in (3, 4, 5):
        layout = piece.number(1)
        address = stored = 0
        if layout == 0:
            stored = piece.number(2)
        elif layout == 1:
            address, stored = piece.offset(), piece.length()
    else:
        raise damaged("a layout")
    if layout == 3:
        raise unusable(f"{name[:80]!r} is a virtual dataset: its numbers are in other files", _INSIDE)
    if layout == 2:
        if needed > file.size * _MAX_RATIO:
            raise damaged(f"{name[:80]!r} claims {needed} bytes")
        return
    missing = address == file.undefined or not file.has(address, stored)
    if needed and (stored != needed or (layout == 1 and missing)):
        raise damaged(f"{name[:80]!r} claims {needed} bytes, which are not there")


def attribute(piece: Piece, file: FileBytes) -> tuple[str, tuple[str, ...] | None]:
    """The name of an attribute, and its texts when it holds texts."""
    version, flags = piece.number(1), piece.number(1)
    sizes = [piece.number(2) for _ in range(3)]
    if version == 3:
        piece.take(1)
    elif version not in (1, 2):
        raise damaged("an attribute")
    parts = []
    for size in sizes:
        parts.append(piece.part(size))
        if version == 1:
            piece.take(min(-size % 8, piece.left))
    name = parts[0].data.split(b"\0")[0].decode("utf-8", "replace")
    if flags & 1:
        return name, None  # of a named type: Keras writes none
    found, count = data_type(parts[1]), math.prod(data_space(parts[2]))
    if not found.text:
        return name, None
    if count > MAX_TEXTS:
        raise damaged(f"an attribute of {count} texts")
    if found.text == "fixed":
        return name, tuple(_text(piece.take(found.item_bytes)) for _ in range(count))
    texts = []
    for _ in range(count):
        piece.take(4)
        address, index = piece.offset(), piece.number(4)
        empty = address in (0, file.undefined)
        texts.append("" if empty else _text(global_object(file, address, index)))
    return name, tuple(texts)


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode("utf-8", "replace")


def link(piece: Piece) -> tuple[str, int]:
    """The name of a link and the address it leads to. Raises SpecError for any but a plain one."""
    if piece.number(1) != 1:
        raise damaged("a link")
    flags = piece.number(1)
    kind = piece.number(1) if flags & 8 else 0
    piece.take((8 if flags & 4 else 0) + (1 if flags & 16 else 0))
    name = piece.take(piece.number(1 << (flags & 3))).decode("utf-8", "replace")
    if kind == 0:
        return name, piece.offset()
    raise refused_link(
        name, {1: "a soft link", 64: "an external link, which leads to another file"}.get(kind, "a link")
    )


def refused_link(name: str, what: str) -> Exception:
    return unusable(f"{name[:80]!r} is {what}; it is not followed", _INSIDE)
