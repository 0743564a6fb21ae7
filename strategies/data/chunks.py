"""Rows of a file that is decoded a chunk at a time (csv, jsonl, parquet), through a small cache of decoded chunks.

Invariant: memory is bounded by the cache however large the file is; a chunk is one block of the sample order, so a
window of blocks fits the cache and every chunk is decoded about once per epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from strategies.data.dataset import (
    BLOCK_BYTES,
    BLOCK_ROWS_LIMIT,
    IN_MEMORY_BYTES,
    WINDOW_BLOCKS,
    Array,
    Features,
    Indices,
    Shape,
)
from strategies.data.rows import Fields, row_bytes
from strategies.data.target import TargetSummary

CACHE_BYTES = 2 * WINDOW_BLOCKS * BLOCK_BYTES
# The first batch of a window decodes all of its chunks while the other ranks wait, so text, which decodes at some
# 10 MB/s, has small windows: a second or two.
TEXT_BLOCK_BYTES = 1024 * 1024
TEXT_WINDOW_BLOCKS = 16
Chunk = tuple[Array, Array | None]  # features as the model gets them, raw target


class ChunkFile(Protocol):
    """One open file: `starts[i]` is the first row of chunk i, the last entry the number of rows."""

    @property
    def path(self) -> Path: ...
    @property
    def fields(self) -> Fields: ...
    @property
    def starts(self) -> Indices: ...
    @property
    def feature_shape(self) -> Shape: ...
    @property
    def feature_dtype(self) -> str: ...
    @property
    def target(self) -> TargetSummary | None: ...
    @property
    def window_blocks(self) -> int:
        """At most so many chunks are shuffled together."""

    def read(self, chunk: int) -> Chunk: ...


class ChunkCache:
    """Decoded chunks, the least recently used dropped when over the bound. Shared by the shards of a source."""

    def __init__(self, capacity_bytes: int = CACHE_BYTES) -> None:
        self._capacity_bytes = capacity_bytes
        self._held_bytes = 0
        self._chunks: OrderedDict[tuple[Path, int], Chunk] = OrderedDict()

    def get(self, file: ChunkFile, number: int) -> Chunk:
        key = (file.path, number)
        if key in self._chunks:
            self._chunks.move_to_end(key)
            return self._chunks[key]
        chunk = file.read(number)
        self._chunks[key] = chunk
        self._held_bytes += _size(chunk)
        while self._held_bytes > self._capacity_bytes and len(self._chunks) > 1:
            self._held_bytes -= _size(self._chunks.popitem(last=False)[1])
        return chunk


class ChunkRows:
    """Rows gathered from the chunks they lie in."""

    def __init__(self, file: ChunkFile, cache: ChunkCache) -> None:
        self._file = file
        self._cache = cache
        self.fields = file.fields
        self.rows = int(file.starts[-1])
        self.feature_shapes: Shape = file.feature_shape
        self.feature_dtypes = file.feature_dtype
        self.target = file.target
        self.block_rows = max(1, int(np.diff(file.starts).max(initial=1)))
        block_bytes = self.block_rows * row_bytes(self)
        self.window_blocks = max(1, min(file.window_blocks, CACHE_BYTES // 2 // max(1, block_bytes)))
        self.keep = file.path.stat().st_size < IN_MEMORY_BYTES

    def gather(self, indices: Indices) -> tuple[Features, Array | None]:
        which = np.searchsorted(self._file.starts, indices, side="right") - 1
        order = np.argsort(which, kind="stable")
        edges = np.flatnonzero(np.diff(which[order], prepend=-1, append=len(self._file.starts)))
        features = np.empty((len(indices), *self.feature_shapes), dtype=self.feature_dtypes)
        target: Array | None = None
        for begin, end in pairwise(edges.tolist()):
            places = order[begin:end]
            number = int(which[places[0]])
            chunk_features, chunk_target = self._cache.get(self._file, number)
            own = indices[places] - self._file.starts[number]
            features[places] = chunk_features[own]
            if chunk_target is not None:
                if target is None:
                    target = np.empty((len(indices), *chunk_target.shape[1:]), dtype=chunk_target.dtype)
                target[places] = chunk_target[own]
        return features, target


def chunk_rows_for(mean_text_bytes: float, decoded_bytes: int, block_bytes: int) -> int:
    """Rows of a chunk so that neither its text nor its decoded rows are over the block by much."""
    return max(1, min(BLOCK_ROWS_LIMIT, int(block_bytes / max(mean_text_bytes, decoded_bytes, 1.0))))


def _size(chunk: Chunk) -> int:
    features, target = chunk
    return features.nbytes + (0 if target is None else target.nbytes)
