"""Where HDF5 keeps names, long attributes and the links of large groups: heaps, and the trees that point into them.

Only what lies in the heaps of names and texts is read; the trees over chunks of numbers are not.
"""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.identify.hdf5_bytes import FileBytes, Piece, damaged

MAX_ENTRIES = 400_000
_NODE_HEAD_BYTES = 10  # of a B-tree of version 2: signature, version, type and checksum
_MAX_DEPTH = 16


def local_heap(file: FileBytes, address: int) -> bytes:
    """The names of one old group."""
    head = file.piece(address, 8 + 2 * file.length_bytes + file.offset_bytes)
    head.expect(b"HEAP")
    head.take(4)
    size = head.length()
    head.length()
    return file.piece(head.offset(), size).data


def name_at(heap: bytes, offset: int) -> str:
    end = heap.find(b"\0", offset)
    if not 0 <= offset < len(heap) or end < 0:
        raise damaged("a name")
    return heap[offset:end].decode("utf-8", "replace")


def symbols(file: FileBytes, tree: int) -> Iterator[Piece]:
    """The symbol-table entries of an old group, in the order of their names."""
    waiting = [tree]
    entry_bytes = 2 * file.offset_bytes + 24
    nodes = 0
    while waiting:
        address = waiting.pop()
        nodes += 1
        if nodes > MAX_ENTRIES:
            raise damaged("a tree without end")
        head = file.piece(address, 8)
        signature, count = head.take(4), 0
        if signature == b"SNOD":
            head.take(2)
            count = head.number(2)
            table = file.piece(address + 8, count * entry_bytes)
            for _ in range(count):
                yield table.part(entry_bytes)
        elif signature == b"TREE":
            if head.number(1) != 0:
                raise damaged("a tree of another kind")
            head.take(1)
            count = head.number(2)
            body = file.piece(address + 8 + 2 * file.offset_bytes, count * (file.length_bytes + file.offset_bytes))
            below = []
            for _ in range(count):
                body.length()
                below.append(body.offset())
            waiting += reversed(below)
        else:
            raise damaged("no tree")


def global_object(file: FileBytes, address: int, index: int) -> bytes:
    """A text of variable length."""
    head = file.piece(address, 8 + file.length_bytes)
    head.expect(b"GCOL")
    head.take(4)
    collection = file.piece(address, head.length())
    collection.take(8 + file.length_bytes)
    while collection.left >= 8 + file.length_bytes:
        found = collection.number(2)
        collection.take(6)
        size = collection.length()
        if found == index:
            return collection.take(size)
        if found == 0:
            break
        collection.take(min((size + 7) // 8 * 8, collection.left))
    raise damaged("a text that is not there")


def records(file: FileBytes, address: int) -> Iterator[Piece]:
    """The records of a B-tree of version 2."""
    head = file.piece(address, 16 + file.offset_bytes + 2)
    head.expect(b"BTHD")
    head.take(2)
    node_bytes, record_bytes, depth = head.number(4), head.number(2), head.number(2)
    head.take(2)
    root, count = head.offset(), head.number(2)
    if root == file.undefined or count == 0:
        return
    if record_bytes == 0 or depth > _MAX_DEPTH or node_bytes < _NODE_HEAD_BYTES + record_bytes:
        raise damaged("a tree")
    count_bytes, totals = _widths(file, node_bytes, record_bytes, depth)
    waiting = [(root, count, depth)]
    seen = 0
    while waiting:
        at, count, level = waiting.pop()
        seen += count + 1
        if seen > MAX_ENTRIES:
            raise damaged("a tree without end")
        node = file.piece(at, node_bytes)
        node.expect(b"BTLF" if level == 0 else b"BTIN")
        node.take(2)
        for _ in range(count):
            yield node.part(record_bytes)
        for _ in range(count + 1 if level else 0):
            child, held = node.offset(), node.number(count_bytes)
            node.take(totals[level - 1])
            waiting.append((child, held, level - 1))


def _widths(file: FileBytes, node_bytes: int, record_bytes: int, depth: int) -> tuple[int, list[int]]:
    """How many bytes a node's counts take: of its own records, and of all below a level (none for leaves)."""
    most = (node_bytes - _NODE_HEAD_BYTES) // record_bytes
    count_bytes = _encoded_bytes(most)
    total, totals = most, [0]
    for _ in range(depth):
        pointer = file.offset_bytes + count_bytes + totals[-1]
        most = max(0, node_bytes - _NODE_HEAD_BYTES - pointer) // (record_bytes + pointer)
        total = (most + 1) * total + most
        totals.append(_encoded_bytes(total))
    return count_bytes, totals


def _encoded_bytes(limit: int) -> int:
    return (max(limit, 1).bit_length() - 1) // 8 + 1


class FractalHeap:
    """The heap of a large group's links, or of an object's many attributes."""

    def __init__(self, file: FileBytes, address: int) -> None:
        self._file = file
        head = file.piece(address, 22 + 12 * file.length_bytes + 3 * file.offset_bytes)
        head.expect(b"FRHP")
        head.take(1)
        self.id_bytes = head.number(2)
        filters = head.number(2)
        head.take(1)
        largest_object = head.number(4)
        head.take(2 * file.length_bytes + 2 * file.offset_bytes)
        head.take(8 * file.length_bytes)
        self._width = head.number(2)
        self._first_bytes, self._direct_bytes = head.length(), head.length()
        bits = head.number(2)
        head.take(2)
        self._root = head.offset()
        self._rows = head.number(2)
        if filters or not self._width or not self._first_bytes or not 0 < bits <= 64 or self._rows > 64:
            raise damaged("a heap")
        self._offset_bytes = (bits + 7) // 8
        self._length_bytes = _encoded_bytes(min(largest_object, self._direct_bytes))

    def get(self, identity: Piece) -> Piece:
        """The object of an id. Raises SpecError for one that is kept elsewhere."""
        first = identity.number(1)
        kind = first >> 4 & 3
        if kind == 2:
            return identity.part((first & 15) + 1)
        if kind != 0:
            raise damaged("an object outside its heap")
        offset, length = identity.number(self._offset_bytes), identity.number(self._length_bytes)
        return self._file.piece(self._address(offset), length)

    def _address(self, offset: int) -> int:
        """Where in the file an offset of the heap's own space lies."""
        if self._rows == 0:
            return self._root + offset
        block, rows = self._root, self._rows
        for _ in range(_MAX_DEPTH):
            row, start = 0, 0
            while offset >= start + self._width * self._row_bytes(row):
                start += self._width * self._row_bytes(row)
                row += 1
                if row >= rows:
                    raise damaged("a heap's block")
            size = self._row_bytes(row)
            column = (offset - start) // size
            head = 5 + self._file.offset_bytes + self._offset_bytes
            entry = head + (row * self._width + column) * self._file.offset_bytes
            child = self._file.piece(block + entry, self._file.offset_bytes).offset()
            offset -= start + column * size
            if size <= self._direct_bytes:
                return child + offset
            block, rows = child, (size // (self._first_bytes * self._width)).bit_length()
        raise damaged("a heap without end")

    def _row_bytes(self, row: int) -> int:
        return self._first_bytes << max(0, row - 1)
