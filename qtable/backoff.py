"""A cell with few visits borrows from its neighbours: cell -> (latency, nodes) -> action -> 0.

Each level is shrunk towards the level above it by n / (n + k), n being the visits of that level. The same levels say
how far off a prediction must still be expected to be.
"""

from __future__ import annotations

import numpy as np

from qtable.state import ACTIONS, StateKey
from qtable.table import Array, QTable

STRENGTH = 3.0  # k: visits after which a level weighs as much as what it borrows from
PRIOR_DEVIATION = 0.2  # of ln(T_pred / T_meas) of a first run: bench/strategy_predict.py
LEAST_DEVIATION = 0.05  # two runs of the same are not closer

Levels = tuple[tuple[slice | int, ...], ...]


def residuals(table: QTable, key: StateKey, strength: float = STRENGTH) -> dict[str, float]:
    """The correction, in log time, of the prediction of every action in this cell."""
    learned, visits = table.residual(), table.n
    answer = np.zeros(len(ACTIONS))
    for level in _levels(key):
        count, mean = _pooled(learned[level], visits[level])
        weight = count / (count + strength)
        answer = weight * mean + (1.0 - weight) * answer
    return {action: float(value) for action, value in zip(ACTIONS, answer, strict=True)}


def deviations(table: QTable, key: StateKey, strength: float = STRENGTH) -> dict[str, float]:
    """Standard deviation of ln(T_pred / T_meas) still to be expected of every action in this cell."""
    answer = np.full(len(ACTIONS), PRIOR_DEVIATION**2)
    for level in _levels(key):
        count, mean = _pooled(table.mean[level], table.n[level])
        within = table.m2[level].reshape(-1, len(ACTIONS)).sum(axis=0)
        off = (table.mean[level] - mean).reshape(-1, len(ACTIONS))
        between = (table.n[level].reshape(-1, len(ACTIONS)) * off**2).sum(axis=0)
        free = np.maximum(count - 1, 0)  # one visit says nothing about a spread
        variance = np.divide(within + between, free, out=np.zeros_like(answer), where=free > 0)
        weight = free / (free + strength)
        answer = weight * variance + (1.0 - weight) * answer
    spread = np.maximum(np.sqrt(answer), LEAST_DEVIATION)
    return {action: float(value) for action, value in zip(ACTIONS, spread, strict=True)}


def _levels(key: StateKey) -> Levels:
    """The action everywhere, with as many nodes at such a latency, in this cell."""
    everywhere = slice(None)
    return (
        (everywhere, everywhere, everywhere, everywhere),
        (everywhere, everywhere, key.nodes, key.latency),
        (key.complexity, key.samples, key.nodes, key.latency),
    )


def _pooled(learned: Array, visits: Array) -> tuple[Array, Array]:
    """Visits and visit-weighted mean of a block, per action."""
    flat_visits = visits.reshape(-1, len(ACTIONS))
    flat_learned = learned.reshape(-1, len(ACTIONS))
    count = flat_visits.sum(axis=0)
    total = (flat_visits * flat_learned).sum(axis=0)
    return count, np.divide(total, count, out=np.zeros_like(total), where=count > 0)
