"""The cluster as the planner sees it: connected nodes with what they measured, and the links between pairs of them.

strategies.links says what stands in for a link that is not measured. Loopback counts as not measured: there a probe
sees the cost of TLS and of Python, not the link, and what gloo reaches over loopback is known.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from coordinator.control.state import NodeStatus
from coordinator.sessions import Sessions
from protos.capacity import Capacity
from protos.ids import NodeId
from protos.plan import ClusterView, Learned, NodeView
from protos.states import Activity, Eligibility, NodeLink
from strategies.links import LOOPBACK

_NAMED = 3

JOIN_HINT = "start one with hive-node start --token TOKEN; hive token create prints the whole command"
WAIT_HINT = "hive nodes shows how each one is: measuring takes seconds, hive-node resume ends a pause"


@dataclass(frozen=True, slots=True)
class Away:
    """A member that takes no work now. `capacity` None: it has never said what it has."""

    node_id: NodeId
    name: str
    doing: str
    capacity: Capacity | None


def away(nodes: Iterable[NodeStatus], capacity: Callable[[NodeId], Capacity | None]) -> tuple[Away, ...]:
    """Those that may come back: disconnected, paused, cordoned or measuring, but not those that have left."""
    return tuple(
        Away(node.node_id, node.name, _doing(node), capacity(node.node_id))
        for node in nodes
        if node.link is not NodeLink.LEFT and not node.willing
    )


def said_of(members: Sequence[Away]) -> str:
    """n1 is disconnected, n2 is paused and 4 more"""
    more = f" and {len(members) - _NAMED} more" if len(members) > _NAMED else ""
    return ", ".join(f"{member.name} is {member.doing}" for member in members[:_NAMED]) + more


def nobody(nodes: Iterable[NodeStatus]) -> tuple[str, str]:
    """Why there is no node that takes work (none has joined, or what each of those that have is doing), and a hint."""
    members = away(nodes, lambda _: None)
    if not members:
        return "no node has joined", JOIN_HINT
    return f"no node takes work yet: {said_of(members)}", WAIT_HINT


def _doing(node: NodeStatus) -> str:
    """measuring how fast this machine is; disconnected; cordoned; paused (by its owner)"""
    if node.link is not NodeLink.CONNECTED:
        return node.link.value.lower()
    if node.eligibility is not Eligibility.OK:
        return node.eligibility.value.lower()
    return node.reason or node.activity.value.lower()


def cluster_view(sessions: Sessions, among: Collection[NodeId], learned: Learned | None = None) -> ClusterView:
    """The connected nodes of `among`, taken as idle: who is busy is the scheduler's question, not the planner's.

    `learned`: what finished jobs have taught about them."""
    here = [sessions[node_id] for node_id in sorted(among) if node_id in sessions]
    ids = {each.node_id for each in here}
    links = {pair: link for pair, link in sessions.links.items() if ids.issuperset(pair) and link.network != LOOPBACK}
    nodes = tuple(_idle(each.node_id, each.name, each.capacity) for each in here)
    return ClusterView(nodes, links, learned or Learned())


def once_back(view: ClusterView, away: Iterable[Away]) -> ClusterView:
    """The same with the members that take no work now, as they were when they were last here."""
    known = [_idle(each.node_id, each.name, each.capacity) for each in away if each.capacity is not None]
    return replace(view, nodes=(*view.nodes, *known))


def _idle(node_id: NodeId, name: str, capacity: Capacity) -> NodeView:
    return NodeView(node_id, name, capacity, NodeLink.CONNECTED, Eligibility.OK, Activity.IDLE)
