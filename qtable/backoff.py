"""A cell with few visits borrows from its neighbours: cell -> (latency, nodes) -> action -> 0.

Each level is shrunk towards the level above it by n / (n + k), n being the visits of that level.
"""

from __future__ import annotations

import numpy as np

from qtable.state import ACTIONS, StateKey
from qtable.table import Array, QTable

STRENGTH = 3.0  # k: visits after which a level weighs as much as what it borrows from


def residuals(table: QTable, key: StateKey, strength: float = STRENGTH) -> dict[str, float]:
    """The correction, in log time, of the prediction of every action in this cell."""
    learned, visits = table.residual(), table.n
    answer = np.zeros(len(ACTIONS))
    levels: tuple[tuple[slice | int, ...], ...] = (
        (slice(None), slice(None), slice(None), slice(None)),
        (slice(None), slice(None), key.nodes, key.latency),
        (key.complexity, key.samples, key.nodes, key.latency),
    )
    for level in levels:
        count, mean = _pooled(learned[level], visits[level])
        weight = count / (count + strength)
        answer = weight * mean + (1.0 - weight) * answer
    return {action: float(value) for action, value in zip(ACTIONS, answer, strict=True)}


def _pooled(learned: Array, visits: Array) -> tuple[Array, Array]:
    """Visits and visit-weighted mean of a block, per action."""
    flat_visits = visits.reshape(-1, len(ACTIONS))
    flat_learned = learned.reshape(-1, len(ACTIONS))
    count = flat_visits.sum(axis=0)
    total = (flat_visits * flat_learned).sum(axis=0)
    return count, np.divide(total, count, out=np.zeros_like(total), where=count > 0)
