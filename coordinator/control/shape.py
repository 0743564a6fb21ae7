"""What makes a plan this plan and no other, as far as it matters whether a group can begin under it: pure."""

from __future__ import annotations

from dataclasses import dataclass

from protos.ids import NodeId
from protos.plan import Layout, Plan


@dataclass(frozen=True, slots=True)
class Shape:
    """A strategy over some nodes, and how the model is cut. The same strategy over other nodes is another one: what
    fails with a node that has just come says nothing of the group that works without it."""

    strategy: str
    nodes: frozenset[NodeId]
    layout: Layout | None = None


def shape_of(plan: Plan) -> Shape:
    return Shape(plan.strategy, frozenset(subtask.node_id for subtask in plan.subtasks), plan.layout)
