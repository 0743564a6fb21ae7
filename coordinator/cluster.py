"""The cluster as the planner sees it: connected nodes with what they measured.

Pairs of nodes are not probed yet: strategies.links says what stands in for an unmeasured link.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from coordinator.control.state import NodeStatus
from coordinator.sessions import Sessions
from protos.ids import NodeId
from protos.plan import ClusterView, NodeView
from protos.states import Activity, Eligibility, NodeLink

_NAMED = 3

JOIN_HINT = "start one with hive-node start --token TOKEN; hive token create prints the whole command"
_WAIT_HINT = "hive nodes shows how each one is: measuring takes seconds, hive-node resume ends a pause"


def nobody(nodes: Iterable[NodeStatus]) -> tuple[str, str]:
    """Why there is no node that takes work (none has joined, or what each of those that have is doing), and a hint."""
    why = [f"{node.name} is {_doing(node)}" for node in nodes if node.link is not NodeLink.LEFT and not node.willing]
    if not why:
        return "no node has joined", JOIN_HINT
    more = f" and {len(why) - _NAMED} more" if len(why) > _NAMED else ""
    return f"no node takes work yet: {', '.join(why[:_NAMED])}{more}", _WAIT_HINT


def _doing(node: NodeStatus) -> str:
    """measuring how fast this machine is; disconnected; cordoned; paused (by its owner)"""
    if node.link is not NodeLink.CONNECTED:
        return node.link.value.lower()
    if node.eligibility is not Eligibility.OK:
        return node.eligibility.value.lower()
    return node.reason or node.activity.value.lower()


def cluster_view(sessions: Sessions, among: Collection[NodeId]) -> ClusterView:
    """The connected nodes of `among`, taken as idle: who is busy is the scheduler's question, not the planner's."""
    views = tuple(
        NodeView(
            node_id,
            sessions[node_id].name,
            sessions[node_id].capacity,
            NodeLink.CONNECTED,
            Eligibility.OK,
            Activity.IDLE,
        )
        for node_id in sorted(among)
        if node_id in sessions
    )
    return ClusterView(views)
