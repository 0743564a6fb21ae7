"""Byte-level language modelling: a text, or a folder of texts read as one, cut into sequences.

Row i is the bytes [i L, i L + L] of the corpus: features are the first L of them, the target the last L, both int64, so
that the target is the features shifted by one. A corpus below IN_MEMORY_BYTES is read, a larger file is mapped, larger
folders are read piece by piece; nothing is ever copied into one file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from strategies.data.dataset import IN_MEMORY_BYTES, WINDOW_BLOCKS, Array, Indices, block_rows_for
from strategies.data.rows import Fields
from strategies.data.source import unusable
from strategies.data.target import TargetKind, TargetSummary

DEFAULT_SEQUENCE_LENGTH = 128
BYTE_VALUES = 256
_OPEN_FILES = 64
Bytes = npt.NDArray[np.uint8]


class Corpus(Protocol):
    @property
    def bytes(self) -> int: ...
    def pieces(self, starts: Indices, length: int) -> Bytes:
        """[len(starts), length]: the bytes from each start."""


class TextRows:
    keep = False  # a kept row would take sixteen times the bytes it has in the corpus

    def __init__(self, where: str, corpus: Corpus, sequence_length: int | None) -> None:
        length = sequence_length or DEFAULT_SEQUENCE_LENGTH
        self._corpus = corpus
        self._length = length
        self.rows = max(0, (corpus.bytes - 1) // length)
        if not self.rows:
            raise unusable(
                f"{where}: {corpus.bytes} bytes of text are less than one sequence of {length} and the byte after it",
                "set a smaller data.sequence_length or give more text",
            )
        self.fields = Fields(None, None, length)
        self.feature_shapes = (length,)
        self.feature_dtypes = "int64"
        self.target = TargetSummary("text", TargetKind.INTEGER, True, 0, BYTE_VALUES - 1, (length,))
        self.block_rows = block_rows_for(length)
        self.window_blocks = WINDOW_BLOCKS

    def gather(self, indices: Indices) -> tuple[Array, Array]:
        pieces = self._corpus.pieces(indices * self._length, self._length + 1)
        return pieces[:, :-1].astype(np.int64, order="C"), pieces[:, 1:].astype(np.int64, order="C")


class OneText:
    """A corpus that lies in one array, read or mapped."""

    def __init__(self, content: Bytes) -> None:
        self._content = content
        self.bytes = len(content)

    def pieces(self, starts: Indices, length: int) -> Bytes:
        view = np.lib.stride_tricks.sliding_window_view(self._content, length)
        return view[starts]  # not take(): it would copy the overlapping view as a whole


class ManyTexts:
    """Files one after the other, read where needed through a bounded number of open ones."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._ends = np.cumsum([path.stat().st_size for path in paths], dtype=np.int64)
        self.bytes = int(self._ends[-1])
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def pieces(self, starts: Indices, length: int) -> Bytes:
        out = np.empty((len(starts), length), dtype=np.uint8)
        for row, start in enumerate(starts.tolist()):
            self._fill(memoryview(out[row]), start)
        return out

    def _fill(self, piece: memoryview, start: int) -> None:
        number = int(np.searchsorted(self._ends, start, side="right"))
        while piece:
            begin = int(self._ends[number - 1]) if number else 0
            file = self._file(number)
            file.seek(start - begin)
            wanted = min(len(piece), int(self._ends[number]) - start)
            if file.readinto(piece[:wanted]) != wanted:  # type: ignore[attr-defined]
                raise unusable(f"{self._paths[number].name} changed while it was read", "leave data files alone")
            piece, start, number = piece[wanted:], start + wanted, number + 1

    def _file(self, number: int) -> BinaryIO:
        if number not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[number] = self._paths[number].open("rb")
        self._open.move_to_end(number)
        return self._open[number]


def corpus_of(paths: Sequence[Path], in_memory_bytes: int = IN_MEMORY_BYTES) -> Corpus:
    """The texts of these files, in this order, as one."""
    total = sum(path.stat().st_size for path in paths)
    if total < in_memory_bytes:
        return OneText(np.frombuffer(b"".join(path.read_bytes() for path in paths), dtype=np.uint8))
    if len(paths) == 1:
        return OneText(np.asarray(np.memmap(paths[0], dtype=np.uint8, mode="r")))
    return ManyTexts(paths)


def text_rows(where: str, text: str | bytes, sequence_length: int | None) -> TextRows:
    """Rows of a text in memory."""
    content = text.encode() if isinstance(text, str) else text
    return TextRows(where, OneText(np.frombuffer(content, dtype=np.uint8)), sequence_length)
