"""Which pairs of nodes to probe next. Pure: nodes, what is known and the time in, pairs out.

Invariants: at most one probe at a time per machine (a second one would measure the first); never where a job runs on a
node of either machine; a pair is probed when it is new, when the networks it shares change, and every ten minutes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from protos.capacity import Capacity
from protos.ids import NodeId
from strategies.links import LOOPBACK

AGAIN_S = 600.0
FIRST_RETRY_S = 15.0
LONGEST_RETRY_S = 600.0

Pair = tuple[NodeId, NodeId]  # sorted


@dataclass(frozen=True, slots=True)
class Party:
    """A node that understands rosters."""

    node_id: NodeId
    capacity: Capacity

    @property
    def machine(self) -> str:
        return self.capacity.machine_id or self.node_id

    @property
    def listens(self) -> bool:
        return self.capacity.peer_port is not None


@dataclass(frozen=True, slots=True)
class Attempted:
    """The last probe of a pair. `failures` in a row; `shared` is what it was made over."""

    at_s: float
    shared: frozenset[str]
    failures: int = 0

    def due_s(self) -> float:
        if self.failures:
            return self.at_s + min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self.failures - 1, 10))
        return self.at_s + AGAIN_S


def shared_networks(a: Capacity, b: Capacity) -> frozenset[str]:
    """On which two nodes may meet: loopback of one machine, networks that both owners named."""
    common = {network.cidr for network in a.networks} & {network.cidr for network in b.networks}
    far = {cidr for cidr in common if not _is_loopback(cidr)}
    near = {LOOPBACK} & common if a.machine_id and a.machine_id == b.machine_id else set()
    return frozenset(far | near)


def pair_of(a: NodeId, b: NodeId) -> Pair:
    return (a, b) if a < b else (b, a)


def next_pairs(
    parties: Iterable[Party],
    idle: Collection[NodeId],
    occupied: Collection[NodeId],
    known: Mapping[Pair, Attempted],
    now_s: float,
) -> list[tuple[NodeId, NodeId]]:
    """(who calls, who is called) of every probe to begin now: those never tried first, then the oldest.

    `idle`: nodes that may be asked. `occupied`: those that work, are measured or are in a probe that is under way.
    """
    everyone = list(parties)
    closed = {party.machine for party in everyone if party.node_id in occupied}
    asked = sorted((party for party in everyone if party.node_id in idle), key=lambda party: party.node_id)
    waiting = []
    for a, b in combinations(asked, 2):
        shared = shared_networks(a.capacity, b.capacity)
        if not shared or not (a.listens or b.listens) or closed & {a.machine, b.machine}:
            continue
        last = known.get((a.node_id, b.node_id))
        if last is None or last.shared != shared or now_s >= last.due_s():
            waiting.append((last.at_s if last is not None else float("-inf"), a, b))
    chosen = []
    for _, a, b in sorted(waiting, key=lambda entry: (entry[0], entry[1].node_id, entry[2].node_id)):
        if not closed & {a.machine, b.machine}:
            closed |= {a.machine, b.machine}
            chosen.append((a.node_id, b.node_id) if b.listens else (b.node_id, a.node_id))
    return chosen


def _is_loopback(cidr: str) -> bool:
    try:
        return cidr == LOOPBACK or ipaddress.ip_network(cidr, strict=False).is_loopback
    except ValueError:
        return True
