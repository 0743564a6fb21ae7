"""How many passes of the model every rank makes, so that all of them gather its parameters the same number of times.

Plain arithmetic on what all ranks know: rows, shares and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.sample_order import slice_of


@dataclass(frozen=True, slots=True)
class Turns:
    """`samples` and `pieces` of every rank: its rows of a full global batch and into how many micro-batches they go."""

    samples: tuple[int, ...]
    pieces: tuple[int, ...]

    def of_step(self, global_rows: int) -> int:
        """Of the rank with the most micro-batches."""
        rows = [self._rows(global_rows, rank) for rank in range(len(self.samples))]
        return max(min(pieces, own) for pieces, own in zip(self.pieces, rows, strict=True))

    def rows_at_once(self, rank: int) -> int:
        """When nothing is kept for a backward pass."""
        return max(self.samples[rank] // max(self.pieces[rank], 1), 1)

    def of_evaluation(self, rows: int) -> int:
        own = [(self._rows(rows, rank), self.rows_at_once(rank)) for rank in range(len(self.samples))]
        return max(-(-count // at_once) for count, at_once in own)

    def _rows(self, rows: int, rank: int) -> int:
        start, stop = slice_of(rows, self.samples, rank)
        return stop - start
