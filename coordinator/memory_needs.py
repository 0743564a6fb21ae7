"""What models of a family of layers turned out to need of memory, times what is predicted: pure, over events.

A factor per family, on what a prediction holds beyond the workers' own reserve, between 1 and MOST. An event that says
a worker ran out of memory raises it to what would have been too much for that node. Jobs of the family that end well
draw it slowly to what they measured: running out costs a job, smaller micro-batches some percent. A family that never
ran out of memory has none. Refuses to learn from predictions of another cost model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator.comparison import compare
from protos.ids import NodeId
from protos.plan import Plan
from protos.work import Usage
from strategies.cost import COST_MODEL_VERSION
from strategies.memory import RESERVE_BYTES

MARGIN = 1.05  # beyond the limit that was broken: by how much nobody knows
MOST = 4.0  # more than that is no error of a prediction, but a program that leaks
TOWARDS_MEASURED = 0.1  # of the way, in logarithms, with each rank that ends well
NEXT_TO_NOTHING = 1.01  # a factor below is forgotten
LEAST_BYTES = RESERVE_BYTES  # predicted beyond the reserve: what a smaller one takes says little about the family
MOST_FAMILIES = 100


@dataclass(slots=True)
class MemoryNeeds:
    """`ran_out` and `measured` in the order of the log, then ask `factors`."""

    factors: dict[str, float] = field(default_factory=dict)  # by family

    def ran_out(self, payload: Mapping[str, Any]) -> bool:
        """Of an event that `running_out` made; True when it taught something. Raises KeyError, TypeError, ValueError
        for one that is odd."""
        if payload["cost_model_version"] != COST_MODEL_VERSION:
            return False
        family, reserve = str(payload["family"]), _size(payload["reserve_bytes"])
        predicted = (_size(payload["predicted_bytes"]) - reserve) / _factor(payload["factor"])
        if predicted <= 0:
            return False
        factor = min(MOST, MARGIN * (_size(payload["limit_bytes"]) - reserve) / predicted)
        if factor <= self.factors.get(family, 1.0):
            return False
        self._put(family, factor)
        return True

    def ended_well(self, used: Mapping[str, Any]) -> None:
        """One of `used_bytes`. Raises as `ran_out` does."""
        family, measured = str(used["family"]), _size(used["measured_bytes"])
        predicted, known = _size(used["predicted_bytes"]) / _factor(used["factor"]), self.factors.get(family)
        if known is None or predicted < LEAST_BYTES:
            return
        target = min(MOST, max(1.0, measured / predicted))
        factor = known * (target / known) ** TOWARDS_MEASURED
        if factor < NEXT_TO_NOTHING:
            del self.factors[family]
        else:
            self._put(family, factor)

    def _put(self, family: str, factor: float) -> None:
        """The newest last; the oldest gives way."""
        self.factors.pop(family, None)
        self.factors[family] = factor
        if len(self.factors) > MOST_FAMILIES:
            del self.factors[next(iter(self.factors))]


def running_out(plan: Plan, node_id: NodeId, limit_bytes: int) -> dict[str, Any] | None:
    """What is written down when a rank of this plan ran out of memory on this node, which grants so much; None when
    the plan, of an older version, says too little of it. `factor` is in the prediction."""
    rank = next((rank for rank in plan.estimate.ranks if rank.node_id == node_id), None)
    predicted, basis = plan.estimate.memory_bytes.get(node_id), plan.estimate.basis
    if rank is None or predicted is None or basis is None:
        return None
    devices = [subtask.device for subtask in plan.subtasks if subtask.node_id == node_id]
    workers = len(devices) if len(set(devices)) == 1 else 1  # each GPU has its own memory
    return {
        "plan_id": plan.id,
        "node": node_id,
        "family": rank.family,
        "work": basis.work.value,
        "predicted_bytes": predicted,
        "factor": rank.memory_factor,
        "reserve_bytes": workers * RESERVE_BYTES,
        "limit_bytes": limit_bytes,
        "cost_model_version": plan.cost_model_version,
    }


def used_bytes(plan: Plan, usages: Sequence[tuple[int, Usage]]) -> list[dict[str, Any]]:
    """Predicted and measured beyond the reserve, of each node of a group; `factor` is in the prediction."""
    ranks = {rank.node_id: rank for rank in plan.estimate.ranks}
    return [
        {
            "node": node,
            "family": ranks[NodeId(node)].family,
            "predicted_bytes": sides["predicted"]["memory_bytes"],
            "measured_bytes": sides["measured"]["memory_bytes"],
            "factor": ranks[NodeId(node)].memory_factor,
        }
        for node, sides in compare(plan, usages, {}, 0.0).items()
        if node in ranks and sides["predicted"]["memory_bytes"] is not None
    ]


def _size(value: Any) -> float:
    size = float(value)
    if not 0 <= size < math.inf:
        raise ValueError(f"no size in bytes: {value}")
    return size


def _factor(value: Any) -> float:
    factor = float(value)
    if not 1 <= factor <= MOST:
        raise ValueError(f"no factor between 1 and {MOST:g}: {value}")
    return factor
