"""The cluster as the planner sees it: connected nodes with what they measured, and the links between pairs."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from coordinator.control.state import NodeStatus
from coordinator.sessions import Sessions
from protos.capacity import Capacity, LinkEstimate
from protos.ids import NodeId
from protos.plan import ClusterView, NodeView
from protos.states import Activity, Eligibility, NodeLink

LOOPBACK_RTT_S = 1e-4
LOOPBACK_BYTES_PER_S = 1.5e9
UNMEASURED_RTT_S = 1e-3
UNMEASURED_BYTES_PER_S = 1e8

_NAMED = 3


def nobody(nodes: Iterable[NodeStatus]) -> str:
    """Why there is no node that takes work: none has joined, or what each of those that have is doing."""
    why = [f"{node.name} is {_doing(node)}" for node in nodes if node.link is not NodeLink.LEFT and not node.willing]
    if not why:
        return "no node has joined"
    more = f" and {len(why) - _NAMED} more" if len(why) > _NAMED else ""
    return f"no node takes work yet: {', '.join(why[:_NAMED])}{more}"


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
    links = {
        (a.node_id, b.node_id): link(a.capacity, b.capacity)
        for position, a in enumerate(views)
        for b in views[position + 1 :]
    }
    return ClusterView(views, links)


def link(a: Capacity, b: Capacity) -> LinkEstimate:
    """Until pairs are probed: loopback on one machine, else the worse of what each measured to the coordinator."""
    if a.machine_id and a.machine_id == b.machine_id:
        return LinkEstimate(LOOPBACK_RTT_S, LOOPBACK_BYTES_PER_S, "loopback")
    rtt_s = max(UNMEASURED_RTT_S if c.rtt_s is None else c.rtt_s for c in (a, b))
    rates = [c.bandwidth_bytes_per_s or UNMEASURED_BYTES_PER_S for c in (a, b)]
    rates += [c.max_upload_bytes_per_s for c in (a, b) if c.max_upload_bytes_per_s]
    mine = {network.cidr for network in a.networks if network.cidr != "loopback"}
    common = sorted(mine & {network.cidr for network in b.networks})
    return LinkEstimate(rtt_s, min(rates), common[0] if common else None)
