"""Where a job falls in the table: an observation in, a cell out.

Owns the bins of the four axes and the fixed order of the five actions; both are written into every snapshot, so that a
table is never read with another meaning. Invariant: a key is always inside SHAPE.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import NamedTuple

ACTIONS = ("data_parallel", "model_parallel", "pipeline_parallel", "federated", "single_node")

PARAMETER_EDGES = (1_000_000.0, 100_000_000.0, 1_000_000_000.0)  # < 1e6, < 1e8, < 1e9, more
ROW_EDGES = (10_000.0, 100_000.0)  # < 1e4, < 1e5, more
NODE_EDGES = (2.0, 5.0, 10.0)  # <= 2, <= 5, <= 10, more
LATENCY_EDGES_S = (0.002, 0.030)  # < 2 ms, < 30 ms, more

BINS: dict[str, tuple[float, ...]] = {
    "parameters_below": PARAMETER_EDGES,
    "rows_below": ROW_EDGES,
    "nodes_up_to": NODE_EDGES,
    "median_rtt_s_below": LATENCY_EDGES_S,
}
SHAPE = (4, 3, 4, 3, 5)


class StateKey(NamedTuple):
    """A cell of the table, without the action."""

    complexity: int
    samples: int
    nodes: int
    latency: int


@dataclass(frozen=True, slots=True)
class Observation:
    """What the key is made of. `median_rtt_s` is over the pairs of usable nodes, 0 when there is no pair."""

    parameters: int
    rows: int
    nodes: int
    median_rtt_s: float

    @property
    def key(self) -> StateKey:
        if (
            min(self.parameters, self.rows, self.nodes) < 0
            or not self.median_rtt_s >= 0
            or math.isnan(self.median_rtt_s)
        ):
            raise ValueError(f"an observation holds no negative or unknown number: {self}")
        return StateKey(
            bisect_right(PARAMETER_EDGES, self.parameters),
            bisect_right(ROW_EDGES, self.rows),
            bisect_left(NODE_EDGES, self.nodes),
            bisect_right(LATENCY_EDGES_S, self.median_rtt_s),
        )


def action_index(action: str) -> int:
    """Raises ValueError for a name that is not one of ACTIONS."""
    return ACTIONS.index(action)
