"""The nodes among themselves, as the coordinator arranges it: rosters signed and kept fresh, links probed in turn.

Owns which node is on which roster and what came of the probes. Invariants: a roster lives minutes and is renewed only
while its generation is current; a node that is gone or removed is off every roster within a second; a job that ends, or
a new fence, ends the roster of the old one. Kept in memory: after a restart links are measured again, which takes about
a second per pair, and rosters are sent with the next offer.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from coordinator.authority import Authority
from coordinator.control.state import State
from coordinator.probe_pairs import Attempted, Pair, Party, next_pairs, pair_of, shared_networks
from coordinator.sessions import Session, Sessions
from protos import roster as rosters
from protos.artifact import Manifest
from protos.capacity import LinkEstimate
from protos.dial import join_address
from protos.errors import HiveError
from protos.gen import membership_pb2 as pb
from protos.ids import Digest, Fence, JobId, NodeId
from protos.log import Log
from protos.roster import MAX_ADDRESSES, MAX_DIGESTS, MAX_MEMBERS, SMALLEST_BYTES, Action, Member, PeerAddress, Roster
from protos.states import Activity

log = Log("hive.coordinator.peers")

ROSTER_S = 600.0
ROUND_S = 120.0
PROBE_S = 60.0
_TICK_S = 1.0
_MAX_REMEMBERED = 10_000


@dataclass(slots=True)
class _Group:
    """The roster of one generation: who works, who else may have its files, what was said last and to whom."""

    job_id: JobId
    fence: Fence
    nodes: tuple[NodeId, ...]
    helpers: tuple[NodeId, ...]
    digests: tuple[Digest, ...]
    sent: dict[NodeId, Session] = field(default_factory=dict)
    members: tuple[Member, ...] = ()
    issued_s: float = -math.inf
    given: bool = False  # there was somebody to talk to


class Peers:
    """`is_current(job, fence)`: whether that generation still works."""

    def __init__(
        self,
        authority: Authority,
        sessions: Sessions,
        state: Callable[[], State],
        is_current: Callable[[JobId, Fence], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._authority = authority
        self._sessions = sessions
        self._state = state
        self._is_current = is_current
        self._clock = clock
        self._groups: dict[JobId, _Group] = {}
        self._holders: dict[Digest, set[NodeId]] = {}
        self._tried: dict[Pair, Attempted] = {}
        self._probing: set[NodeId] = set()

    # ---- rosters

    def admit(self, job_id: JobId, fence: Fence, nodes: Iterable[NodeId], manifests: Iterable[Manifest]) -> None:
        """Before a generation is offered: its nodes may fetch its larger files from each other, and from connected
        nodes that worked with the same files before. The same generation again changes nothing."""
        known = self._groups.get(job_id)
        if known is not None and known.fence >= fence:
            return
        if known is not None:
            self._end(known)
        digests = worth_asking_for(manifests)
        working = tuple(dict.fromkeys(nodes))
        helpers = {node_id for digest in digests for node_id in self._holders.get(digest, ())} - set(working)
        group = self._groups[job_id] = _Group(job_id, fence, working, tuple(sorted(helpers)), digests)
        self._remember(digests, working)
        self._issue(group)

    def _remember(self, digests: Iterable[Digest], nodes: Iterable[NodeId]) -> None:
        for digest in digests:
            self._holders[digest] = self._holders.pop(digest, set()) | set(nodes)
        while len(self._holders) > _MAX_REMEMBERED:
            del self._holders[next(iter(self._holders))]

    def _present(self, group: _Group) -> dict[NodeId, Session]:
        """Those of a group that are connected and understand rosters, the ones that work first."""
        here = {}
        for node_id in (*group.nodes, *group.helpers)[:MAX_MEMBERS]:
            session = self._sessions.get(node_id)
            if session is not None and not session.closed and session.key_sha256:
                here[node_id] = session
        return here

    def _issue(self, group: _Group) -> None:
        now_s, here = self._clock(), self._present(group)
        members = _members(group, here)
        group.sent, group.members, group.issued_s = here, members, now_s
        group.given = group.given or (len(members) > 1 and any(member.addresses for member in members))
        if group.given:
            self._send(Roster(group.job_id, group.fence, members, group.digests, now_s, now_s + ROSTER_S), here)

    def _end(self, group: _Group) -> None:
        """Whoever holds the roster learns that it is over."""
        self._groups.pop(group.job_id, None)
        now_s = self._clock()
        members = tuple(member_of(session, (), serves=False) for session in group.sent.values())
        if group.given:
            self._send(Roster(group.job_id, group.fence, members, (), now_s, now_s), group.sent)

    def _send(self, roster: Roster, to: dict[NodeId, Session]) -> None:
        document = rosters.encode(roster)
        signed = pb.SignedRoster(roster_json=document, signature=self._authority.sign_roster(document))
        for session in to.values():
            session.send(pb.CoordinatorMessage(roster=signed))

    def keep_rosters(self) -> None:
        """End those of generations that are over, renew those that are half spent, or whose members have changed: who
        is here, and where each is reached."""
        for group in list(self._groups.values()):
            if not self._is_current(group.job_id, group.fence):
                self._end(group)
            elif self._clock() - group.issued_s > ROSTER_S / 2 or self._outdated(group):
                self._issue(group)

    def _outdated(self, group: _Group) -> bool:
        here = self._present(group)
        return here != group.sent or _members(group, here) != group.members

    # ---- probes

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(_TICK_S)
                try:
                    self.keep_rosters()
                    for caller, called in self.due():
                        self._probing |= {caller, called}
                        group.create_task(self.probe(caller, called))
                except Exception:
                    log.exception("peers not arranged")

    def due(self) -> list[tuple[NodeId, NodeId]]:
        """(who calls, who is called) of the probes to begin now."""
        parties = [
            Party(session.node_id, session.capacity) for session in self._sessions.values() if session.key_sha256
        ]
        here = {party.node_id for party in parties}
        for pair in [pair for pair in self._tried if not here.issuperset(pair)]:
            del self._tried[pair]  # measured again when it is back: it may be elsewhere by then
            self._sessions.links.pop(pair, None)
        for asked in [asked for asked in self._sessions.unanswered if not here.issuperset(asked)]:
            del self._sessions.unanswered[asked]
        state = self._state()
        occupied = {
            node_id for node_id, session in self._sessions.items() if session.tasks or not session.capacity.flops
        }
        occupied |= {node.node_id for node in state.nodes.values() if node.activity is Activity.BUSY}
        occupied |= state.busy() | self._probing
        return next_pairs(parties, state.idle(), occupied, self._tried, self._clock())

    async def probe(self, caller: NodeId, called: NodeId) -> None:
        """One of those that are due; whatever comes of it is noted, and nothing is raised."""
        pair = pair_of(caller, called)
        try:
            await self._probe_pair(caller, called, pair)
        except HiveError as error:
            self._failed(pair, error.message)
        except Exception as error:
            log.exception("a probe failed")
            self._failed(pair, str(error))
        finally:
            self._probing -= {caller, called}

    async def _probe_pair(self, caller: NodeId, called: NodeId, pair: Pair) -> None:
        here = {node_id: self._sessions[node_id] for node_id in pair if node_id in self._sessions}
        if len(here) < 2:
            return
        shared = shared_networks(here[caller].capacity, here[called].capacity)
        self._tried[pair] = Attempted(self._clock(), shared, self._failures(pair))
        now_s, subject = self._clock(), f"r-{secrets.token_hex(8)}"
        members = (member_of(here[caller], (Action.PROBE,), serves=False), member_of(here[called], (), serves=True))
        self._send(Roster(subject, Fence(0), members, (), now_s, now_s + ROUND_S), here)
        found = await self._sessions.probe(caller, subject, called, PROBE_S)
        link = link_of(found, shared)
        if found.unanswered:
            self._sessions.unanswered[caller, called] = self._sessions.unanswered.get((caller, called), 0) + 1
        elif link is not None:
            self._sessions.unanswered[caller, called] = 0
        if link is None:
            self._failed(pair, found.problem or "what it measured makes no sense")
        else:
            self._sessions.links[pair] = link
            self._tried[pair] = Attempted(self._clock(), shared)
            log.info("link measured", a=pair[0], b=pair[1], network=link.network, rtt_s=link.rtt_s)

    def _failures(self, pair: Pair) -> int:
        last = self._tried.get(pair)
        return last.failures if last is not None else 0

    def _failed(self, pair: Pair, why: str) -> None:
        """What was measured before stays: a link that is busy is not a worse one."""
        last = self._tried.get(pair)
        shared = last.shared if last is not None else frozenset()
        self._tried[pair] = Attempted(self._clock(), shared, self._failures(pair) + 1)
        log.info("link not measured", a=pair[0], b=pair[1], reason=why)


def worth_asking_for(manifests: Iterable[Manifest]) -> tuple[Digest, ...]:
    """The files that a peer may be asked for, the largest first."""
    sizes = {entry.digest: entry.bytes for manifest in manifests for entry in manifest.files}
    large = sorted((digest for digest, size in sizes.items() if size >= SMALLEST_BYTES), key=lambda d: (-sizes[d], d))
    return tuple(large[:MAX_DIGESTS])


def _members(group: _Group, here: dict[NodeId, Session]) -> tuple[Member, ...]:
    return tuple(
        member_of(session, (Action.FETCH,) if node_id in group.nodes else (), _gives_files(session))
        for node_id, session in here.items()
    )


def _gives_files(session: Session) -> bool:
    """Where the owner bounds the upload, the coordinator is the better source."""
    return session.capacity.max_upload_bytes_per_s is None


def member_of(session: Session, may: Sequence[Action], serves: bool) -> Member:
    """With the addresses it is asked at, if it serves."""
    capacity = session.capacity
    addresses = tuple(
        PeerAddress(network.cidr, join_address(network.address, capacity.peer_port))
        for network in capacity.networks[:MAX_ADDRESSES]
        if serves and capacity.peer_port is not None
    )
    return Member(session.node_id, capacity.machine_id, session.key_sha256, addresses, tuple(may))


def link_of(found: pb.ProbeResult, shared: frozenset[str]) -> LinkEstimate | None:
    """The slower direction; None for a result that is none. What a node says is believed only within reason."""
    rate = min(found.upload_bytes_per_s, found.download_bytes_per_s)
    numbers = (found.rtt_minimum_s, found.rtt_median_s, rate)
    if found.problem or found.network not in shared:
        return None
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        return None
    return LinkEstimate(found.rtt_median_s, rate, found.network)
