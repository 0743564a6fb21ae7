"""What one origin has learned: per cell and action a residual, and number, mean and spread of the rewards behind it.

An origin is a coordinator (the name of its log) or an imported ranking. A table in use is all contributions together,
`pooled`: counts, means and sums of squares exactly (Chan, Golub, LeVeque 1979), residuals weighted by visits.
Invariants: arrays have SHAPE and are finite, a cell without visits holds zeros, no number is one that rewards cannot
give.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt

from qtable.reward import LIMIT
from qtable.state import SHAPE
from qtable.update import corrected

Array = npt.NDArray[np.float64]
PARTS = ("residual", "n", "mean", "m2")
MOST_VISITS = 1e9  # of a cell: far more than jobs can be
_ROUNDING = 1e-6


def _zeros() -> Array:
    return np.zeros(SHAPE)


@dataclass(slots=True)
class Contribution:
    """`seq`: how far its origin's log was read; of two of the same origin the later one counts. `m2`: sum of squared
    deviations of the rewards (Welford, 1962)."""

    seq: int = 0
    residual: Array = field(default_factory=_zeros)
    n: Array = field(default_factory=_zeros)
    mean: Array = field(default_factory=_zeros)
    m2: Array = field(default_factory=_zeros)

    def learn(self, index: tuple[int, ...], reward: float) -> None:
        self.n[index] += 1
        count = int(self.n[index])
        self.residual[index] = corrected(float(self.residual[index]), 0.0, reward, count)
        before = reward - self.mean[index]
        self.mean[index] += before / count
        self.m2[index] += before * (reward - self.mean[index])

    @property
    def visits(self) -> int:
        return int(self.n.sum())

    def check(self) -> None:
        """Raises ValueError when an invariant does not hold: what came from outside passes through here."""
        for name in PARTS:
            array: Any = getattr(self, name)
            if array.shape != SHAPE or array.dtype != np.float64:
                raise ValueError(f"{name} has shape {array.shape} of {array.dtype}, expected {SHAPE} of float64")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds a number that is not finite")
        if not 0 <= self.seq < 2**63:
            raise ValueError("seq is negative or larger than any log")
        if (self.n < 0).any() or (self.n != np.floor(self.n)).any() or (self.m2 < 0).any():
            raise ValueError("a count or a sum of squares is negative or not whole")
        if (self.n > MOST_VISITS).any():
            raise ValueError(f"a count is above {MOST_VISITS:g}")
        limit = LIMIT + _ROUNDING
        if (abs(self.residual) > limit).any() or (abs(self.mean) > limit).any():
            raise ValueError(f"a residual or a mean is beyond +-{LIMIT}, which no reward is")
        if (self.m2 > self.n * limit**2).any():
            raise ValueError("a sum of squares is larger than rewards can give")
        nothing = self.n == 0
        if self.residual[nothing].any() or self.mean[nothing].any():
            raise ValueError("a cell that was never visited holds a residual")

    def cells(self) -> dict[str, list[Any]]:
        """As JSON: the visited cells only, by their number in the flat table."""
        where = np.flatnonzero(self.n)
        return {"cell": where.tolist()} | {name: getattr(self, name).ravel()[where].tolist() for name in PARTS}

    @classmethod
    def of_cells(cls, seq: int, cells: Any) -> Contribution:
        """Raises ValueError for what `cells` cannot have written."""
        made = cls(seq)
        try:
            where = [int(each) for each in cells["cell"]]
            if any(not 0 <= each < made.n.size for each in where) or len(set(where)) != len(where):
                raise ValueError("a cell is named twice or is not of this table")
            for name in PARTS:
                values = np.array(cells[name], dtype=np.float64)
                if values.shape != (len(where),):
                    raise ValueError(f"{name} is not one number per cell")
                getattr(made, name).ravel()[where] = values
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"a contribution lacks a field or has one of the wrong type: {error}") from None
        made.check()
        return made


def pooled(
    parts: Iterable[Contribution], at: tuple[int, ...] | EllipsisType = ...
) -> tuple[Array, Array, Array, Array]:
    """(residual, n, mean, m2) of all of them, in this order, everywhere or in one cell. One part alone stays as it is,
    to the last bit."""
    residual, n, mean, m2 = (np.zeros(SHAPE)[at] for _ in PARTS)
    for part in parts:
        count = part.n[at]
        total = n + count
        weight = count / np.maximum(total, 1.0)
        apart = part.mean[at] - mean
        m2 = m2 + part.m2[at] + apart * apart * n * weight
        mean = mean + apart * weight
        residual = residual + (part.residual[at] - residual) * weight
        n = total
    return residual, n, mean, m2
