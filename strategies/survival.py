"""What losses of nodes cost a plan: the share of its time that is left (Young 1974, Daly 2006).

A node is lost every `mtbf_s` on average. A loss interrupts the whole group for RESTART_S. Where the model is cut, or
one node has all of it, the steps since the newest checkpoint that is not on the lost node are made again: half an
interval on average, and in parts one more (a set of parts is uploaded only after the one before it). In a group of
whole models every other node has the newest step. `efficiency` divides a predicted time.
"""

from __future__ import annotations

from collections.abc import Iterable

from protos.plan import Layout, NodeView

RESTART_S = 6.0  # noticing (a lease lives 5 s), holding and forming a new group
LEAST = 0.05  # a plan that would lose more than that share is no better described by a formula


def efficiency(nodes: Iterable[NodeView], layout: Layout | None, checkpoint_every_s: float) -> float:
    """Share of the time that is progress, in [LEAST, 1]."""
    used = {node.node_id: node for node in nodes}
    losses_per_s = sum(1.0 / node.mtbf_s for node in used.values() if node.mtbf_s is not None)
    return max(LEAST, 1.0 - losses_per_s * (RESTART_S + _lost_s(len(used), layout, checkpoint_every_s)))


def _lost_s(nodes: int, layout: Layout | None, checkpoint_every_s: float) -> float:
    if nodes > 1 and (layout is None or not cut(layout)):
        return 0.0
    return checkpoint_every_s * (0.5 if nodes == 1 else 1.5)


def cut(layout: Layout) -> bool:
    """Whether no rank has the whole model."""
    return len(layout.stages) > 1 or layout.sharded or layout.tensor > 1
