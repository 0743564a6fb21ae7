"""The links between nodes as far as they are known, and which nodes may talk to each other directly.

Measured pairs win. Nodes of one machine talk over loopback; between machines the slower of the two links to the
coordinator stands in until the pair is measured.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from statistics import median
from types import MappingProxyType

from protos.ids import NodeId
from protos.plan import ClusterView, LinkUse, NodeView
from strategies import cost

LOOPBACK = "loopback"
LOOPBACK_RTT_S = 0.0001
LOOPBACK_BYTES_PER_S = 1.5e9  # gloo all-reduce of 100 MB between two processes
LOOPBACK_CORE_BYTES_PER_S = 2e9  # the same for each second of one core: what a cap below that lets through
LAN_CORE_BYTES_PER_S = 1e9  # of a second of one core, sent and received between machines
CARRIED_S = 7e-4  # of a core, for each collective of a layer: gloo's threads wake up, add and send
LAN_RTT_S = 0.001  # assumed until measured
ALIKE = 1.5  # links whose speeds differ by less are taken as equally fast
LAN_BYTES_PER_S = 117e6  # 1 Gbit/s less the TCP/IP headers, assumed until measured


@dataclass(frozen=True, slots=True)
class Link:
    rtt_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class TrustedGroup:
    """Nodes whose owners allow direct collectives over `network`: loopback of one machine, or a CIDR both named."""

    network: str
    nodes: tuple[NodeView, ...]


def link_between(cluster: ClusterView, a: NodeView, b: NodeView) -> Link:
    """The slower direction, capped by the upload either owner allows; never zero, as it divides."""
    caps = [cap for node in (a, b) if (cap := node.capacity.max_upload_bytes_per_s)]
    measured = cluster.link(a.node_id, b.node_id)
    if measured is not None:
        return Link(measured.rtt_s, max(1.0, min([measured.bandwidth_bytes_per_s, *caps])))
    if a.capacity.machine_id == b.capacity.machine_id:
        share = min(cost.core_share(node.capacity) for node in (a, b))  # there is no wire: copying is all there is
        return Link(LOOPBACK_RTT_S / share, min(LOOPBACK_BYTES_PER_S, LOOPBACK_CORE_BYTES_PER_S * share))
    rtts = [rtt for node in (a, b) if (rtt := node.capacity.rtt_s) is not None]
    rates = [rate for node in (a, b) if (rate := node.capacity.bandwidth_bytes_per_s)]
    return Link(max(rtts, default=LAN_RTT_S), max(1.0, min([*(rates or [LAN_BYTES_PER_S]), *caps])))


def network_between(cluster: ClusterView, a: NodeView, b: NodeView) -> str:
    """The trusted network over which the two talk; "" when there is none."""
    if a.capacity.machine_id == b.capacity.machine_id:
        return LOOPBACK
    measured = cluster.link(a.node_id, b.node_id)
    if measured is not None and measured.network:
        return measured.network
    common = {each.cidr for each in a.capacity.networks} & {each.cidr for each in b.capacity.networks}
    return min((cidr for cidr in common if not _is_loopback(cidr)), default="")


def joined_by_quick_links(cluster: ClusterView, nodes: Sequence[NodeView]) -> tuple[tuple[NodeView, ...], ...]:
    """All of them; then, for every speed that some link has (within a factor of ALIKE), the sets of nodes that links of
    at least that speed join, each set once."""
    speeds = {
        (a, b): round(math.log(link_between(cluster, nodes[a], nodes[b]).bytes_per_s, ALIKE))
        for a, b in combinations(range(len(nodes)), 2)
    }
    found = dict.fromkeys([tuple(range(len(nodes)))])
    for least in sorted(set(speeds.values()))[1:]:  # the slowest joins all
        part = list(range(len(nodes)))
        for (a, b), speed in speeds.items():
            if speed >= least and part[a] != part[b]:
                part = [part[a] if each == part[b] else each for each in part]
        for name in dict.fromkeys(part):
            members = tuple(index for index, each in enumerate(part) if each == name)
            if len(members) > 1:
                found[members] = None
    return tuple(tuple(nodes[index] for index in members) for members in found)


def median_rtt_s(cluster: ClusterView, nodes: Sequence[NodeView]) -> float:
    """Over all pairs; 0 when there is no pair."""
    return median([link_between(cluster, a, b).rtt_s for a, b in combinations(nodes, 2)] or [0.0])


def download_s(size_bytes: int, node: NodeView) -> float:
    """From the coordinator to the node. A node without a measurement is taken to be on the LAN."""
    if size_bytes <= 0:
        return 0.0
    capacity = node.capacity
    return (capacity.rtt_s or LAN_RTT_S) + size_bytes / (capacity.bandwidth_bytes_per_s or LAN_BYTES_PER_S)


def overlap_over(network: str) -> float:
    """g of cost.mix: over loopback the cores that compute also copy, so that nothing is won by doing both at once."""
    return 1.0 if network == LOOPBACK else cost.OVERLAP


def carrying_s(network: str, network_s: float, sent_bytes: float, collectives: int, node: NodeView) -> float:
    """What exchanging so much takes of the node's own cores, under its cap: over loopback there is nothing else."""
    if node.capacity.gpus:
        return 0.0
    per_core = LOOPBACK_CORE_BYTES_PER_S if network == LOOPBACK else LAN_CORE_BYTES_PER_S
    seconds = (sent_bytes / per_core + collectives * CARRIED_S) / max(node.capacity.cores, 0.01)
    return max(seconds, network_s) if network == LOOPBACK else seconds


Traffic = Mapping[tuple[NodeId, NodeId], tuple[float, float]]
"""Bytes and seconds of a step between two nodes, under the sorted ids."""


def ring_traffic(nodes: Sequence[NodeView], sent_bytes: float, seconds: float) -> Traffic:
    """Every rank sends so much to the next one, the last to the first; ranks of one node use no link."""
    found: dict[tuple[NodeId, NodeId], tuple[float, float]] = {}
    for a, b in zip(nodes, [*nodes[1:], *nodes[:1]], strict=True):
        add_traffic(found, a.node_id, b.node_id, sent_bytes, seconds)
    return {pair: (sent, seconds) for pair, (sent, _) in found.items()}


def add_traffic(
    found: dict[tuple[NodeId, NodeId], tuple[float, float]], a: NodeId, b: NodeId, sent_bytes: float, seconds: float
) -> None:
    if a != b:
        pair = (min(a, b), max(a, b))
        sent, took_s = found.get(pair, (0.0, 0.0))
        found[pair] = (sent + sent_bytes, took_s + seconds)


def link_uses(*parts: Traffic) -> tuple[LinkUse, ...]:
    """All traffic of a step, a pair of nodes once."""
    total: dict[tuple[NodeId, NodeId], tuple[float, float]] = {}
    for part in parts:
        for (a, b), (sent, seconds) in part.items():
            add_traffic(total, a, b, sent, seconds)
    return tuple(LinkUse(a, b, sent, seconds) for (a, b), (sent, seconds) in sorted(total.items()))


def worst_link(cluster: ClusterView, nodes: Sequence[NodeView]) -> Link:
    """The longest round trip and the lowest rate among all pairs: what a collective of all of them waits for."""
    links = [link_between(cluster, a, b) for a, b in combinations(nodes, 2)]
    return Link(max((link.rtt_s for link in links), default=0.0), min((x.bytes_per_s for x in links), default=math.inf))


def collected_s(cluster: ClusterView, nodes: Sequence[NodeView], size_bytes: float) -> float:
    """At the end of the job the first of `nodes` gets what the others have of the model, and delivers it whole."""
    first, *others = nodes
    links = [link_between(cluster, first, other) for other in others if other.node_id != first.node_id]
    if not links:
        return 0.0
    return max(link.rtt_s for link in links) + size_bytes / min(link.bytes_per_s for link in links)


def ranks_of(node: NodeView) -> int:
    """One per granted GPU; a node without one is one rank."""
    return max(1, len(node.capacity.gpus))


def all_have_gpu(nodes: Iterable[NodeView]) -> bool:
    """Then nccl carries what their ranks sum; otherwise gloo does."""
    return all(node.capacity.gpus for node in nodes)


Apart = Mapping[tuple[NodeId, NodeId], str]
"""protos.plan.ClusterView.apart."""


def trusted_groups(nodes: Iterable[NodeView], apart: Apart = MappingProxyType({})) -> tuple[TrustedGroup, ...]:
    """Groups of two ranks or more, in which everyone can connect to everyone; a node may be in several."""
    groups: dict[tuple[str, str], list[NodeView]] = {}
    for node in nodes:
        if node.capacity.machine_id:
            groups.setdefault((LOOPBACK, node.capacity.machine_id), []).append(node)
        for cidr in sorted({network.cidr for network in node.capacity.networks}):
            if not _is_loopback(cidr):
                groups.setdefault((cidr, ""), []).append(node)
    return tuple(
        TrustedGroup(network, members)
        for (network, _), everyone in groups.items()
        for members in _connected(everyone, apart)
        if sum(map(ranks_of, members)) > 1
    )


def _connected(nodes: Sequence[NodeView], apart: Apart) -> Iterator[tuple[NodeView, ...]]:
    """For every node the largest set around it that is quick to find in which no two are apart, each set once."""
    alone_from: dict[NodeId, set[NodeId]] = {node.node_id: set() for node in nodes}
    for a, b in apart:
        if a in alone_from and b in alone_from:
            alone_from[a].add(b)
            alone_from[b].add(a)
    if not any(alone_from.values()):
        yield tuple(nodes)
        return
    easiest = sorted(nodes, key=lambda node: len(alone_from[node.node_id]))
    found: set[frozenset[NodeId]] = set()
    for first in easiest:
        members = {first.node_id}
        for node in easiest:
            if alone_from[node.node_id].isdisjoint(members):
                members.add(node.node_id)
        if frozenset(members) not in found:
            found.add(frozenset(members))
            yield tuple(node for node in nodes if node.node_id in members)


@lru_cache(maxsize=256)
def _is_loopback(cidr: str) -> bool:
    if cidr == LOOPBACK:
        return True
    try:
        return ipaddress.ip_network(cidr, strict=False).is_loopback
    except ValueError:
        return True  # not a network: nothing that two machines could have in common
