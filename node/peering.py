"""This node among its peers: the listeners kept open, the rosters held, the probes it is asked for.

Owns the wiring between the session (rosters and orders come in, results go out), the service and the client. Decides
nothing about who may do what: see node.roster_book. Invariants: a node whose owner said no listens nowhere; a probe is
broken off as soon as a job starts here; nothing in here ends the daemon.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from node import probe_peers
from node.cancellation import raise_if_cancelled
from node.memory_trim import trim
from node.peer import PeerListeners, PeerService
from node.peer_client import NoAnswer, PeerClient, reachable
from node.roster_book import RosterBook
from protos.capacity import Capacity
from protos.credentials import Credential
from protos.errors import DeadlineExceeded, HiveError, NotFound
from protos.gen import membership_pb2 as pb
from protos.log import Log
from protos.transfer import Limiter

log = Log("hive.node.peering")

OFF = "the owner said --no-peer: files come from the coordinator, and no job spans this machine and another"
NOWHERE = "no trusted network: files come from the coordinator, and no job spans this machine and another"
_FOLLOW_S = 15.0
_PROBE_S = 45.0


@dataclass(slots=True, eq=False)
class Peering:
    """`announce(port)` is told when the port others reach this node at has changed; None: it cannot be reached."""

    wanted: bool
    listeners: PeerListeners
    service: PeerService
    client: PeerClient
    credential: Callable[[], Awaitable[Credential]]
    capacity: Callable[[], Capacity]
    announce: Callable[[int | None], None]
    limiter: Limiter | None
    problem: str = "not joined yet"
    _probes: set[asyncio.Task[pb.ProbeResult]] = field(default_factory=set)

    @property
    def port(self) -> int | None:
        return self.listeners.port

    def joined(self, credential: Credential) -> None:
        """From now on rosters of this authority count, for this node."""
        self.client.book = self.service.book = RosterBook(credential.id, credential.ca_pem.encode())

    async def follow(self) -> None:
        """Listen where this node is trusted now. What fails is tried again and said in `problem`."""
        before = self.port
        networks = self.capacity().networks
        if not self.wanted or not networks:
            await self.listeners.close()
            self.problem = OFF if not self.wanted else NOWHERE
        else:
            try:
                await self.listeners.follow(await self.credential(), [network.address for network in networks])
                self.problem = self.listeners.problem
            except (HiveError, OSError, ValueError) as error:
                self.problem = str(error)
        if self.port != before:
            log.info("peers reach this node", port=self.port, problem=self.problem)
            self.announce(self.port)

    async def keep_open(self) -> None:
        """Networks come and go, certificates are renewed, ports become free."""
        while True:
            await asyncio.sleep(_FOLLOW_S)
            try:
                await self.follow()
            except Exception:
                raise_if_cancelled()
                log.exception("peer listeners not followed")

    async def close(self) -> None:
        self.break_off()
        await self.listeners.close()

    def take(self, signed: pb.SignedRoster) -> None:
        """Raises HiveError for a roster that does not count."""
        if self.service.book is None:
            raise NotFound("a roster came before this node had joined")
        self.service.book.take(signed.roster_json, signed.signature, time.time())

    async def answer(self, order: pb.ProbeOrder) -> pb.ProbeResult:
        """What a probe found, or why it found nothing."""
        probe = asyncio.create_task(self._measured(order))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)
        try:
            await asyncio.wait({probe})
        finally:
            probe.cancel()
            trim()
        if probe.cancelled():
            return pb.ProbeResult(call_id=order.call_id, problem="a job has started here")
        return probe.result()

    def break_off(self) -> None:
        """A job starts: its traffic is worth more than a measurement."""
        for probe in self._probes:
            probe.cancel()

    async def _measured(self, order: pb.ProbeOrder) -> pb.ProbeResult:
        try:
            async with asyncio.timeout(_PROBE_S):
                found = await self._probe(order)
        except TimeoutError:
            found = DeadlineExceeded(f"not measured within {_PROBE_S:.0f} s")
        except HiveError as error:
            found = error
        if isinstance(found, HiveError):
            unanswered = isinstance(found, NoAnswer)
            return pb.ProbeResult(call_id=order.call_id, problem=found.message, unanswered=unanswered)
        return pb.ProbeResult(
            call_id=order.call_id,
            rtt_minimum_s=found.rtt_minimum_s,
            rtt_median_s=found.rtt_median_s,
            upload_bytes_per_s=found.upload_bytes_per_s,
            download_bytes_per_s=found.download_bytes_per_s,
            network=found.network,
        )

    async def _probe(self, order: pb.ProbeOrder) -> probe_peers.Measured | HiveError:
        roster = self.service.book.get(order.subject, time.time()) if self.service.book is not None else None
        member = roster.member(order.peer_id) if roster is not None else None
        if roster is None or member is None:
            return NotFound(f"this node holds no roster of {order.subject} with {order.peer_id}")
        if self.service.busy():
            return HiveError("a job runs here")
        addresses = reachable(member, self.capacity())
        return await probe_peers.measure(await self.credential(), member, addresses, roster.reference, self.limiter)
