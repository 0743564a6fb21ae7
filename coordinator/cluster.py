"""The cluster as the planner sees it: connected nodes with what they measured, and the links between pairs of them.

strategies.links says what stands in for a link that is not measured. Loopback counts as not measured: there a probe
sees the cost of TLS and of Python, not the link, and what gloo reaches over loopback is known.

Owns who is apart: a group connects every rank to every other one, so a node that does not listen for others, or that
nobody reached when the links were probed, works alone and gets its files by way of the coordinator. On one machine
nothing is in between.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from coordinator.control.state import NodeStatus
from coordinator.sessions import Session, Sessions
from protos.capacity import Capacity
from protos.ids import NodeId
from protos.plan import ClusterView, Learned, NodeView
from protos.states import Activity, Eligibility, NodeLink
from strategies.links import LOOPBACK

_NAMED = 3
UNANSWERED = 2  # probes in a row: one alone may have come while the other node was busy
CALLERS = 2  # that got no answer, when nobody did: then it is the node

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


def cluster_view(
    sessions: Sessions,
    among: Collection[NodeId],
    learned: Learned | None = None,
    mtbf_s: Callable[[NodeId], float | None] = lambda node_id: None,
) -> ClusterView:
    """The connected nodes of `among`, taken as idle: who is busy is the scheduler's question, not the planner's.

    `learned`: what finished jobs have taught about them; `mtbf_s`: how long each stays."""
    here = [sessions[node_id] for node_id in sorted(among) if node_id in sessions]
    ids, separate = {each.node_id for each in here}, apart(sessions, here)
    links = {
        pair: link
        for pair, link in sessions.links.items()
        if ids.issuperset(pair) and link.network != LOOPBACK and pair not in separate
    }
    nodes = tuple(replace(_idle(each.node_id, each.name, each.capacity), mtbf_s=mtbf_s(each.node_id)) for each in here)
    return ClusterView(nodes, links, learned or Learned(), separate)


def apart(sessions: Sessions, here: Sequence[Session]) -> dict[tuple[NodeId, NodeId], str]:
    """Pairs of them, on different machines, of which one cannot connect to the other, with the reason."""
    nodes = {each.node_id: each for each in here}
    silent = {pair for pair, count in sessions.unanswered.items() if count >= UNANSWERED}
    alone = {each.node_id: why for each in here if (why := _unreachable(sessions, silent, each))}
    why_apart = {
        (a, b): f"{nodes[b].name} does not answer {nodes[a].name}" for a, b in silent if {a, b} <= nodes.keys()
    }
    why_apart |= {(other, node_id): why for node_id, why in alone.items() for other in nodes if other != node_id}
    return {
        (min(a, b), max(a, b)): why
        for (a, b), why in sorted(why_apart.items())
        if not nodes[a].capacity.machine_id or nodes[a].capacity.machine_id != nodes[b].capacity.machine_id
    }


def _unreachable(sessions: Sessions, silent: Collection[tuple[NodeId, NodeId]], node: Session) -> str:
    """Why no other machine reaches a node; "" for one that some may, or of which nothing is known."""
    if node.key_sha256 and node.capacity.peer_port is None:
        return f"{node.name} does not listen for other nodes"
    callers = [caller for caller, called in silent if called == node.node_id]
    answered = any(called == node.node_id and not count for (_, called), count in sessions.unanswered.items())
    return f"{node.name} does not answer other nodes" if len(callers) >= CALLERS and not answered else ""


def once_back(view: ClusterView, away: Iterable[Away]) -> ClusterView:
    """The same with the members that take no work now, as they were when they were last here."""
    known = [_idle(each.node_id, each.name, each.capacity) for each in away if each.capacity is not None]
    return replace(view, nodes=(*view.nodes, *known))


def _idle(node_id: NodeId, name: str, capacity: Capacity) -> NodeView:
    return NodeView(node_id, name, capacity, NodeLink.CONNECTED, Eligibility.OK, Activity.IDLE)
