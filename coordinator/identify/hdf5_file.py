"""An HDF5 file as a tree of names, shapes, types and texts. The numbers themselves are never read.

Reads what h5py and Keras write: superblocks 0 to 3, both kinds of object header and of group, attributes in the header,
in heaps and of variable length. What leads out of the file is refused by hdf5_messages; nothing else is opened. Bounds:
objects, depth and bytes; an object that is reached twice counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from coordinator.identify import hdf5_messages as messages
from coordinator.identify.hdf5_bytes import AGAIN, FileBytes, Piece, damaged
from coordinator.identify.hdf5_heaps import FractalHeap, local_heap, name_at, records, symbols
from coordinator.identify.hdf5_messages import Kind, refused_link
from coordinator.identify.tensors import MAX_NAME_CHARACTERS, MAX_TENSORS, check_shape, unusable

MAGIC = b"\x89HDF\r\n\x1a\n"
_MAX_DEPTH = 64
_MAX_MESSAGES = 400_000
_SYMBOLIC = 2  # the cache type of a soft link in an old group


@dataclass(slots=True)
class Node:
    """A group, or a dataset when `shape` is not None."""

    name: str
    children: dict[str, Node] = field(default_factory=dict)
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    item_bytes: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape) if self.shape is not None else 0

    def text(self, name: str) -> str | None:
        return next(iter(self.texts.get(name, ())), None)

    def datasets(self, path: str = "") -> Iterator[tuple[str, Node]]:
        """Every dataset below, with its path; the tree is no deeper than _MAX_DEPTH."""
        for name, child in self.children.items():
            below = f"{path}/{name}" if path else name
            if child.shape is not None:
                yield below, child
            else:
                yield from child.datasets(below)


def read_tree(file: BinaryIO, size: int) -> Node:
    """The root group of an HDF5 file. Raises SpecError."""
    source = FileBytes(file, size)
    address = _superblock(source)
    root = Node("")
    seen = {address}
    waiting = [(address, root, 0)]
    while waiting:
        at, node, depth = waiting.pop()
        links = _fill(source, at, node)
        for name, target in links:
            if target in seen:
                continue
            seen.add(target)
            if len(seen) > MAX_TENSORS or depth == _MAX_DEPTH or len(name) > MAX_NAME_CHARACTERS:
                raise unusable("the groups in the HDF5 file are too many, nested too deeply or named too long", AGAIN)
            node.children[name] = Node(name)
            waiting.append((target, node.children[name], depth + 1))
    return root


def _superblock(file: FileBytes) -> int:
    """Sets the widths of addresses; returns that of the root group's header."""
    head = file.piece(0, 16)
    head.expect(MAGIC)
    version = head.number(1)
    if version in (0, 1):
        head.take(4)
    elif version not in (2, 3):
        raise unusable(f"HDF5 of superblock version {version} is not known", AGAIN)
    file.offset_bytes, file.length_bytes = head.number(1), head.number(1)
    if file.offset_bytes not in (2, 4, 8) or file.length_bytes not in (2, 4, 8):
        raise damaged("the width of addresses")
    start = 24 + (4 if version == 1 else 0) if version < 2 else 12
    body = file.piece(start, 6 * file.offset_bytes)
    base = body.offset()
    body.offset()
    end = body.offset()
    if base + end > file.size and end != file.undefined:
        raise damaged(f"{end} bytes are expected")
    if version < 2:
        body.offset()
        body.offset()
    address = body.offset()
    file.base = base
    return address


def _fill(file: FileBytes, address: int, node: Node) -> list[tuple[str, int]]:
    """Puts what the header at an address says into `node`; returns the links of a group."""
    links: list[tuple[str, int]] = []
    layout: Piece | None = None
    kind: messages.DataType | None = None
    for message, flags, body in _messages(file, address):
        match message:
            case Kind.DATASPACE:
                node.shape = check_shape(node.name, messages.data_space(body))
            case Kind.DATATYPE:
                kind = messages.DataType("named type", 0) if flags & 2 else messages.data_type(body)
            case Kind.LAYOUT:
                layout = body
            case Kind.EXTERNAL_FILES:
                raise unusable(f"{node.name[:80]!r} keeps its numbers in another file; it is not opened",
                               "write one file with everything in it")  # fmt: skip
            case Kind.SYMBOL_TABLE:
                links += _old_links(file, body)
            case Kind.LINK:
                links.append(messages.link(body))
            case Kind.LINK_INFO:
                links += _dense_links(file, body)
            case Kind.ATTRIBUTE if not flags & 2:
                _keep(node, *messages.attribute(body, file))
            case Kind.ATTRIBUTE_INFO:
                for piece in _dense(file, body, index_bytes=2, skip=0):
                    _keep(node, *messages.attribute(piece, file))
    if layout is None:
        node.shape = None  # a group, or a named type
    elif node.shape is None or kind is None:
        raise damaged("a dataset without shape or type")
    else:
        node.dtype, node.item_bytes = kind.name, kind.item_bytes
        if kind.item_bytes:
            messages.check_layout(layout, file, node.elements * kind.item_bytes, node.name)
    return links


def _keep(node: Node, name: str, texts: tuple[str, ...] | None) -> None:
    if texts is not None:
        node.texts[name] = texts


def _messages(file: FileBytes, address: int) -> Iterator[tuple[int, int, Piece]]:
    """Type, flags and content of every message of an object header, of its continuations too."""
    head = file.piece(address, min(16, max(0, file.size - file.base - address)))
    is_new = head.data[:4] == b"OHDR"
    ordered = 0
    if is_new:
        flags = head.data[5]
        ordered = 2 if flags & 4 else 0
        start = 6 + (16 if flags & 32 else 0) + (4 if flags & 16 else 0)
        width = 1 << (flags & 3)
        blocks = [(address + start + width, file.piece(address + start, width).number(width), 0)]
    elif head.data[:1] == b"\1":
        head.take(8)
        blocks = [(address + 16, head.number(4), 0)]
    else:
        raise damaged("no object header")
    count = 0
    while blocks:
        at, size, lead = blocks.pop(0)
        block = file.piece(at, size)
        block.take(lead)
        rest = 4 if lead else 0  # a checksum
        while block.left - rest >= (4 + ordered if is_new else 8):
            count += 1
            if count > _MAX_MESSAGES:
                raise damaged("a header without end")
            kind = block.number(1 if is_new else 2)
            length, flags = block.number(2), block.number(1)
            block.take(ordered if is_new else 3)
            body = block.part(length)
            if kind == Kind.CONTINUATION:
                blocks.append((body.offset(), body.length(), 4 if is_new else 0))
            else:
                yield kind, flags, body


def _old_links(file: FileBytes, table: Piece) -> Iterator[tuple[str, int]]:
    tree, heap_address = table.offset(), table.offset()
    heap = local_heap(file, heap_address)
    for entry in symbols(file, tree):
        name, target, cached = name_at(heap, entry.offset()), entry.offset(), entry.number(4)
        if cached == _SYMBOLIC:
            raise refused_link(name, "a soft link")
        yield name, target


def _dense_links(file: FileBytes, info: Piece) -> Iterator[tuple[str, int]]:
    for piece in _dense(file, info, index_bytes=8, skip=4):
        yield messages.link(piece)


def _dense(file: FileBytes, info: Piece, index_bytes: int, skip: int) -> Iterator[Piece]:
    """The messages that are kept in a heap, by the tree of their names; `skip` bytes of a record come before the id."""
    info.take(1)
    if info.number(1) & 1:
        info.take(index_bytes)
    heap_address, tree = info.offset(), info.offset()
    if heap_address == file.undefined:
        return
    heap = FractalHeap(file, heap_address)
    for record in records(file, tree):
        record.take(skip)
        yield heap.get(record.part(heap.id_bytes))
