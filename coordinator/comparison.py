"""What was predicted for each node of a plan and what was measured there, beside each other: pure.

Memory is that above a worker that has imported its libraries and done nothing yet, on both sides. A step and its bytes
are those of a usual step; the ranks of a node that share its memory are added up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from protos.ids import NodeId
from protos.plan import Plan
from protos.work import Usage
from strategies.memory import RESERVE_BYTES


def compare(
    plan: Plan, usages: Sequence[tuple[int, Usage]], names: Mapping[NodeId, str], measured_step_s: float
) -> dict[str, Any]:
    """By node name. `usages` by rank, of the last group; `measured_step_s` is the job's."""
    node_of = {subtask.rank: subtask.node_id for subtask in plan.subtasks}
    devices = {node: len({s.device for s in plan.subtasks if s.node_id == node}) for node in node_of.values()}
    found: dict[str, Any] = {}
    for node_id in dict.fromkeys(node_of.values()):
        used = [usage for rank, usage in usages if node_of.get(rank) == node_id]
        if used:
            shared = devices[node_id] == 1
            found[names.get(node_id, node_id)] = {
                "predicted": _predicted(plan, node_id, len(used) if shared else 1),
                "measured": _measured(used, shared, measured_step_s),
            }
    return found


def _predicted(plan: Plan, node_id: NodeId, workers: int) -> dict[str, Any]:
    """`workers`: processes whose own need is in the plan's memory of this node."""
    estimate = plan.estimate
    ranks = [rank for rank in estimate.ranks if rank.node_id == node_id]
    memory = estimate.memory_bytes.get(node_id)
    return {
        "step_s": estimate.step_s,
        "compute_s": max((rank.compute_s for rank in ranks), default=None),
        "bytes": sum(rank.sent_bytes for rank in ranks) if ranks else None,
        "memory_bytes": None if memory is None else max(0, memory - workers * RESERVE_BYTES),
    }


def _measured(used: Sequence[Usage], shared: bool, step_s: float) -> dict[str, Any]:
    memory = [max(0, usage.peak_memory_bytes - usage.baseline_memory_bytes) for usage in used]
    return {
        "step_s": step_s,
        "compute_s": max(usage.step_compute_s for usage in used),
        "bytes": sum(usage.step_bytes_sent for usage in used),
        "memory_bytes": sum(memory) if shared else max(memory),
    }
