"""The table: Q, its frozen prior Q0, and per cell the number, mean and spread of the rewards seen.

The stored value is Q0 + residual, so that the way of choosing may change without the schema. Mutable on purpose, owned
by one learner. Invariants: all arrays have SHAPE and are finite; n is never negative; last_seq only grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qtable.reward import LIMIT
from qtable.state import SHAPE, StateKey, action_index
from qtable.update import corrected

Array = npt.NDArray[np.float64]
ARRAYS = ("q", "q0", "n", "mean", "m2")


@dataclass(slots=True)
class QTable:
    """`m2` is the sum of squared deviations of the rewards (Welford); `last_seq` the last event that was applied."""

    q: Array
    q0: Array
    n: Array
    mean: Array
    m2: Array
    cost_model_version: int
    last_seq: int = 0

    @classmethod
    def fresh(cls, q0: Array, cost_model_version: int) -> QTable:
        """Nothing learned: Q = Q0."""
        table = cls(q0.copy(), q0.copy(), np.zeros(SHAPE), np.zeros(SHAPE), np.zeros(SHAPE), cost_model_version)
        table.check()
        return table

    def check(self) -> None:
        """Raises ValueError when an invariant does not hold: what was read from a disk passes through here."""
        for name in ARRAYS:
            array: Any = getattr(self, name)
            if array.shape != SHAPE or array.dtype != np.float64:
                raise ValueError(f"{name} has shape {array.shape} of {array.dtype}, expected {SHAPE} of float64")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds a number that is not finite")
        if (self.n < 0).any() or (self.n != np.floor(self.n)).any() or (self.m2 < 0).any():
            raise ValueError("a count or a sum of squares is negative or not whole")
        if self.last_seq < 0:
            raise ValueError(f"last_seq is negative: {self.last_seq}")

    def residual(self) -> Array:
        """What was learned beyond the prior: E = Q - Q0."""
        return self.q - self.q0

    def value(self, key: StateKey, action: str) -> float:
        return float(self.q[(*key, action_index(action))])

    def visits(self, key: StateKey, action: str) -> int:
        return int(self.n[(*key, action_index(action))])

    def deviation(self, key: StateKey, action: str) -> float | None:
        """Standard deviation of the rewards of a cell, None below two visits."""
        index = (*key, action_index(action))
        count = self.n[index]
        return float(np.sqrt(self.m2[index] / (count - 1))) if count >= 2 else None

    def learn(self, key: StateKey, action: str, reward: float) -> None:
        """One outcome. Who calls makes sure that it is applied once: see replay."""
        if not abs(reward) <= LIMIT:
            raise ValueError(f"a reward lies within +-{LIMIT}: {reward}")
        index = (*key, action_index(action))
        self.n[index] += 1
        count = int(self.n[index])
        self.q[index] = corrected(float(self.q[index]), float(self.q0[index]), reward, count)
        before = reward - self.mean[index]
        self.mean[index] += before / count
        self.m2[index] += before * (reward - self.mean[index])
