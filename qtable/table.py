"""The table: Q, its frozen prior Q0, and per cell the number, mean and spread of the rewards seen.

The stored value is Q0 + residual, so that the way of choosing may change without the schema. What is learned here and
what was imported are kept apart by origin (qtable/contribution.py), in the order of their names, so that two tables
with the same contributions are equal to the last bit. Mutable on purpose, owned by one learner. Invariants: `q`, `n`,
`mean` and `m2` are the contributions put together; last_seq only grows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qtable.contribution import Array, Contribution, pooled
from qtable.reward import LIMIT
from qtable.state import SHAPE, StateKey, action_index

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
ARRAYS = ("q", "q0", "n", "mean", "m2")
MOST_ORIGINS = 32


@dataclass(slots=True)
class QTable:
    """`m2` is the sum of squared deviations of the rewards (Welford); `last_seq` the last event that was applied;
    `origin` the name under which this table's own contribution is known to others."""

    q0: Array
    cost_model_version: int
    last_seq: int = 0
    origin: str = ""
    parts: dict[str, Contribution] = field(default_factory=dict)
    q: Array = field(init=False)
    n: Array = field(init=False)
    mean: Array = field(init=False)
    m2: Array = field(init=False)

    def __post_init__(self) -> None:
        self._put(self.origin, self.parts.get(self.origin) or Contribution(self.last_seq))
        self.check()
        self._pool()

    @classmethod
    def fresh(cls, q0: Array, cost_model_version: int, origin: str = "") -> QTable:
        """Nothing learned: Q = Q0."""
        return cls(q0.copy(), cost_model_version, origin=origin)

    def check(self) -> None:
        """Raises ValueError when an invariant does not hold: what was read from a disk passes through here."""
        shape: Any = self.q0.shape
        if shape != SHAPE or not np.isfinite(self.q0).all():
            raise ValueError(f"q0 has shape {shape}, expected {SHAPE}, or holds a number that is not finite")
        if not 0 <= self.last_seq < 2**63:
            raise ValueError("last_seq is negative or larger than any log")
        self.check_room(())
        for part in self.parts.values():
            part.check()

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
        """One outcome of our own. Who calls makes sure that it is applied once: see replay."""
        if not abs(reward) <= LIMIT:
            raise ValueError(f"a reward lies within +-{LIMIT}: {reward}")
        index = (*key, action_index(action))
        self.parts[self.origin].learn(index, reward)
        residual, self.n[index], self.mean[index], self.m2[index] = pooled(self.parts.values(), index)
        self.q[index] = self.q0[index] + residual

    def contributions(self) -> Mapping[str, Contribution]:
        """By origin, in the order of their names; our own as far as it has come."""
        self.parts[self.origin].seq = self.last_seq
        return self.parts

    def lacks(self, origin: str, seq: int) -> bool:
        """Whether a contribution would change anything: not our own, and later than what we have of that origin."""
        known = self.parts.get(origin)
        return origin != self.origin and (known is None or known.seq < seq)

    def check_origin(self) -> None:
        """Raises ValueError when it does not say whose it is, as a table that others import must."""
        if not _NAME.fullmatch(self.origin):
            raise ValueError("it does not say whose it is")

    def check_room(self, origins: Iterable[str]) -> None:
        """Raises ValueError when the table cannot hold contributions of these origins too, or one has no name."""
        together = {*self.parts, *origins}
        if len(together) > MOST_ORIGINS:
            raise ValueError(f"contributions of {len(together)} origins would be held, the most is {MOST_ORIGINS}")
        if not all(_NAME.fullmatch(origin) for origin in together - {self.origin}):
            raise ValueError("a contribution names its origin, in up to 100 letters and digits")

    def take(self, origin: str, contribution: Contribution) -> bool:
        """Count a contribution in place of an earlier one of the same origin; False when there is nothing new in it.

        Raises ValueError when it breaks an invariant, or where there is no room for it.
        """
        self.check_room([origin])
        if not self.lacks(origin, contribution.seq):
            return False
        contribution.check()
        self._put(origin, contribution)
        self._pool()
        return True

    def _put(self, origin: str, contribution: Contribution) -> None:
        held = {**self.parts, origin: contribution}
        self.parts = {name: held[name] for name in sorted(held)}

    def _pool(self) -> None:
        residual, self.n, self.mean, self.m2 = pooled(self.parts.values())
        self.q = self.q0 + residual


__all__ = ["ARRAYS", "MOST_ORIGINS", "Array", "QTable"]
