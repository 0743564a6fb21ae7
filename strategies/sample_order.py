"""Sample order: which rows make up each global batch, and which part of a batch belongs to each rank.

The order is a pure function of (data digest, seed, epoch, position): the same for every strategy, number of nodes and
version of numpy (only the raw Philox stream is used, keyed by blake2b). Blocks of consecutive rows are permuted, then
rows are shuffled inside a window of blocks, so that a source larger than memory is read a window at a time; a dataset
of at most one window is shuffled fully.

Invariants: every row exactly once per epoch; the slices of a batch partition it, in rank order; memory is that of two
windows and one number per block. Refuses to know what a row is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class EpochOrder:
    """The order of one epoch. Not thread safe; `batch` costs a few microseconds inside a window."""

    def __init__(
        self, digest: str, seed: int, epoch: int, rows: int, shuffle: bool, block_rows: int, window_blocks: int
    ) -> None:
        if rows < 0 or block_rows < 1 or window_blocks < 1:
            raise ValueError(f"rows {rows}, block_rows {block_rows} and window_blocks {window_blocks} must be positive")
        self.rows = rows
        self.shuffle = shuffle
        self._key = f"{digest}\0{seed}\0{epoch}"
        self._block_rows = block_rows
        self._window_blocks = window_blocks
        self._blocks: Indices | None = None  # block numbers in the order they are read
        self._short_at = 0  # where in that order the last, possibly short, block stands
        self._short_by = -rows % block_rows
        self._windows: dict[int, Indices] = {}

    def batch(self, step: int, batch_size: int) -> Indices:
        """Rows of global batch `step` of this epoch, counted from 0; only the last one may be smaller."""
        start = step * batch_size
        if batch_size < 1 or step < 0 or start >= self.rows:
            raise IndexError(f"step {step} of batches of {batch_size} is outside an epoch of {self.rows} rows")
        stop = min(start + batch_size, self.rows)
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        parts: list[Indices] = []
        while start < stop:
            window = self._window_of(start)
            first = self._start_of(window)
            part = self._window(window)[start - first : stop - first]
            parts.append(part)
            start += len(part)
        return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)

    def _order(self) -> Indices:
        if self._blocks is None:
            count = -(-self.rows // self._block_rows)
            self._blocks = permutation(count, f"{self._key}\0blocks")
            self._short_at = int(np.flatnonzero(self._blocks == count - 1)[0])
        return self._blocks

    def _start_of(self, window: int) -> int:
        """Position in the epoch of a window's first row."""
        block = min(window * self._window_blocks, len(self._order()))
        return block * self._block_rows - (self._short_by if block > self._short_at else 0)

    def _window_of(self, position: int) -> int:
        self._order()
        window = position // (self._block_rows * self._window_blocks)
        return window + 1 if self._start_of(window + 1) <= position else window

    def _window(self, window: int) -> Indices:
        if window not in self._windows:
            while len(self._windows) > 1:  # a batch may straddle two windows
                self._windows.pop(next(iter(self._windows)))
            blocks = self._order()[window * self._window_blocks : (window + 1) * self._window_blocks]
            starts = blocks * self._block_rows
            rows = (starts[:, None] + np.arange(self._block_rows, dtype=np.int64)).reshape(-1)
            rows = rows[rows < self.rows]
            self._windows[window] = rows[permutation(len(rows), f"{self._key}\0window\0{window}")]
        return self._windows[window]


def permutation(count: int, key: str) -> Indices:
    """A uniform permutation of 0..count-1 that depends on nothing but its arguments, on any machine."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    # Generator.permutation may change between numpy versions; the raw stream and a stable sort may not.
    return np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable").astype(np.int64, copy=False)


def steps(rows: int, batch_size: int) -> int:
    """Global batches in one epoch."""
    return -(-rows // batch_size)


def cut(batch_rows: int, samples: Sequence[int]) -> tuple[int, ...]:
    """Rows of a batch for each rank, in proportion to `samples` by largest remainder; exact for a full batch."""
    total = sum(samples)
    if total < 1 or min(samples) < 0:
        raise ValueError(f"samples {tuple(samples)} must be non-negative and not all zero")
    shares = [divmod(batch_rows * own, total) for own in samples]
    left = batch_rows - sum(share for share, _ in shares)
    first = sorted(range(len(samples)), key=lambda rank: (-shares[rank][1], rank))[:left]
    return tuple(share + (rank in first) for rank, (share, _) in enumerate(shares))


@lru_cache(maxsize=64)
def slice_of(batch_rows: int, samples: tuple[int, ...], rank: int) -> tuple[int, int]:
    """[start, stop) of a rank's contiguous part of a global batch; empty when the batch is too small for it."""
    counts = cut(batch_rows, samples)
    start = sum(counts[:rank])
    return start, start + counts[rank]
