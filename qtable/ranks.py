"""An old table of bare values, used as an order of the actions and never as values.

Such a table was made by another formula for other jobs, so its numbers mean nothing here; that it put one action before
another still may. Zeros are what it was filled with at first, so an action that still holds one was never tried and has
no rank; a cell in which fewer than two were tried, or all are alike, says nothing. Pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from qtable.backoff import PRIOR_DEVIATION
from qtable.contribution import Array, Contribution
from qtable.state import ACTIONS, SHAPE

RANKS = "ranks-"  # the origin of such a contribution begins with it
STEP = 0.05  # of log time, from one rank to the next: from the first of five to the last 20 %
CELLS = SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3]

Ranks = Mapping[int, Sequence[int | None]]  # cell (flat number) -> per action its rank, 0 the best, None never tried


def ranks_of(values: Array) -> dict[int, list[int | None]]:
    """Per cell the order of its actions; equal values share a rank. Raises ValueError for another shape or a value that
    is not finite."""
    if values.shape != SHAPE:
        raise ValueError(f"it holds an array of shape {values.shape}; a table has {SHAPE}")
    if not np.isfinite(values).all():
        raise ValueError("it holds a value that is not finite")
    found: dict[int, list[int | None]] = {}
    for cell, row in enumerate(values.reshape(CELLS, len(ACTIONS)).tolist()):
        order = sorted({value for value in row if value != 0.0}, reverse=True)
        if len(order) > 1:
            found[cell] = [order.index(value) if value != 0.0 else None for value in row]
    return found


def contribution(ranks: Ranks) -> Contribution:
    """As much as one visit of each ranked action: residual = STEP * (mean rank of the cell - its rank), as uncertain as
    a prediction before any run. Raises ValueError for ranks that `ranks_of` cannot have made."""
    made = Contribution()
    for cell, row in ranks.items():
        said = [rank for rank in row if rank is not None]
        ordered = 0 <= cell < CELLS and len(row) == len(ACTIONS) and len(said) > 1
        if not ordered or sorted(set(said)) != list(range(len(set(said)))):
            raise ValueError(f"no ranks of a cell: {cell}: {list(row)}")
        middle = fmean(said)
        for action, rank in enumerate(row):
            if rank is not None:
                index = (*(int(part) for part in np.unravel_index(cell, SHAPE[:4])), action)
                made.n[index] = 1.0
                made.residual[index] = made.mean[index] = STEP * (middle - rank)
                made.m2[index] = PRIOR_DEVIATION**2
    made.check()
    return made


def origin_of(ranks: Ranks) -> str:
    """By what it says: the same order imported again, here or elsewhere, is the same contribution."""
    canonical = json.dumps(sorted((cell, list(row)) for cell, row in ranks.items()))
    return f"{RANKS}{hashlib.sha256(canonical.encode()).hexdigest()[:32]}"
