"""The table as a thing to look at: per cell the best action, and how sure its correction is. Pure.

Confidence is the probability that the correction of an action is within 10 % of what endless jobs would teach: a mean
of n rewards with the spread that their variance, shrunk towards that of the neighbours (qtable/backoff.py), leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from qtable.backoff import deviations
from qtable.contribution import Contribution
from qtable.policy import BAND
from qtable.ranks import RANKS
from qtable.state import ACTIONS, SHAPE, StateKey
from qtable.table import QTable

NAMES = {
    "complexity": ("< 1M", "< 100M", "< 1B", ">= 1B"),
    "samples": ("< 10k", "< 100k", ">= 100k"),
    "nodes": ("<= 2", "<= 5", "<= 10", "> 10"),
    "latency": ("< 2 ms", "< 30 ms", ">= 30 ms"),
}


def confidence(visits: float, deviation: float) -> float:
    """0 without visits. `deviation`: of ln(T_pred / T_meas) of one job."""
    if visits <= 0:
        return 0.0
    return math.erf(math.log1p(BAND) * math.sqrt(visits / 2) / deviation)


def named(key: StateKey) -> dict[str, str]:
    """The bins of a cell in words."""
    return {axis: NAMES[axis][part] for axis, part in key._asdict().items()}


def cells(table: QTable) -> Iterator[dict[str, Any]]:
    """Every cell, as JSON. `best` is the action with the highest Q: of an average job; a job's own prediction comes on
    top when it is planned. `ranked`: of the `n` visits, those that stand for the order in an old table."""
    ordered = [part for origin, part in table.parts.items() if origin.startswith(RANKS)]
    for key in (StateKey(*each) for each in product(*(range(size) for size in SHAPE[:4]))):
        spread = deviations(table, key)
        actions = {action: _action(table, key, action, spread[action], ordered) for action in ACTIONS}
        best = max(ACTIONS, key=lambda action: (table.value(key, action), ACTIONS.index(action)))
        yield {
            "key": list(key),
            "state": named(key),
            "visits": sum(each["n"] for each in actions.values()),
            "best": best,
            "confidence": actions[best]["confidence"],
            "actions": actions,
        }


def _action(
    table: QTable, key: StateKey, action: str, spread: float, ordered: Sequence[Contribution]
) -> dict[str, Any]:
    index = (*key, ACTIONS.index(action))
    visits = table.visits(key, action)
    return {
        "Q": float(table.q[index]),
        "Q0": float(table.q0[index]),
        "residual": float(table.q[index] - table.q0[index]),
        "n": visits,
        "ranked": int(sum(part.n[index] for part in ordered)),
        "mean": float(table.mean[index]),
        "M2": float(table.m2[index]),
        "deviation": table.deviation(key, action),
        "confidence": confidence(visits, spread),
    }
