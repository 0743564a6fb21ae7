"""Calling another node: which of its addresses this one can reach, the channel that proves who answers, files from it.

Owns the client half of the Peer service but for the probes. Invariants: the server is known by its node id in a
certificate of our authority, never by its address; a peer that failed is left alone for a minute; what a peer gave in
part is kept, and the next source goes on there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from node.networks import LOOPBACK
from node.roster_book import RosterBook
from protos import dial, transfer
from protos.capacity import Capacity
from protos.credentials import Credential
from protos.errors import ErrorCode, HiveError, Unreachable
from protos.gen import artifacts_pb2, peer_pb2_grpc
from protos.ids import Digest
from protos.log import Log
from protos.roster import METADATA_KEY, SMALLEST_BYTES, Member, PeerAddress, Reference

log = Log("hive.node.peer_client")

_READY_S = 3.0
_AVOID_S = 60.0
_MAX_SOURCES = 4
_NAME = "grpc.ssl_target_name_override"


class NoAnswer(Unreachable):
    """None of the addresses that were tried lets this node in: nothing listens there, or something is between."""


def reachable(member: Member, capacity: Capacity) -> tuple[PeerAddress, ...]:
    """The addresses of a member on networks that this node has too, and no others whatever it claims. Pure."""
    mine = {network.cidr for network in capacity.networks}
    same_machine = bool(member.machine_id) and member.machine_id == capacity.machine_id
    near = [a for a in member.addresses if a.network == LOOPBACK.cidr and same_machine]
    far = [a for a in member.addresses if a.network != LOOPBACK.cidr and a.network in mine]
    return tuple(each for each in (*near, *far) if _is_on(each))


def _is_on(where: PeerAddress) -> bool:
    try:
        address = ipaddress.ip_address(dial.split_address(where.address)[0])
        return address.is_loopback if where.network == LOOPBACK.cidr else address in ipaddress.ip_network(where.network)
    except (HiveError, ValueError):
        return False


def channel(address: str, credential: Credential, node_id: str) -> grpc.aio.Channel:
    """To a node, which must prove to be `node_id`."""
    credentials = grpc.ssl_channel_credentials(
        credential.ca_pem.encode(), credential.key_pem.encode(), credential.certificate_pem.encode()
    )
    options = (*(option for option in dial.options() if option[0] != _NAME), (_NAME, node_id))
    return grpc.aio.secure_channel(dial.target(address), credentials, options=options)


def metadata(reference: Reference) -> tuple[tuple[str, str], ...]:
    return ((METADATA_KEY, str(reference)),)


@contextlib.asynccontextmanager
async def connected(
    credential: Credential, node_id: str, addresses: Sequence[PeerAddress]
) -> AsyncIterator[tuple[Any, PeerAddress]]:
    """A stub of the first address that answers as that node. Raises NoAnswer, Unreachable where there is no address."""
    for each in addresses:
        async with channel(each.address, credential, node_id) as line:
            try:
                async with asyncio.timeout(_READY_S):
                    if not await _ready(line):
                        continue
            except TimeoutError:
                continue
            yield peer_pb2_grpc.PeerStub(line), each  # type: ignore[no-untyped-call]
            return
    if not addresses:
        raise Unreachable(f"{node_id} has no address on a network of this node", "see --trusted-lan")
    tried = ", ".join(each.address for each in addresses)
    raise NoAnswer(f"{node_id} does not answer ({tried})", "is a firewall between them? see --peer-port")


async def _ready(line: grpc.aio.Channel) -> bool:
    """False as soon as the address refuses, or is not that node: gRPC itself would go on trying."""
    while (state := line.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            return False
        await line.wait_for_state_change(state)
    return True


def error_of(error: grpc.RpcError, node_id: str, address: str) -> HiveError:
    """What the other node said, or that it stopped answering."""
    meant = dial.error_from(error, address)
    trailing: Any = error.trailing_metadata() if isinstance(error, grpc.aio.AioRpcError) else None
    if any(key == dial.ERROR_KEY for key, _ in trailing or ()):
        return meant
    status = error.code().name if isinstance(error, grpc.aio.AioRpcError) else type(error).__name__
    return Unreachable(f"{node_id} at {address} stopped answering ({status})", "it is asked again later")


class PeerSource:
    """protos.transfer's stub over a peer: the same mechanism as with the coordinator, another source."""

    def __init__(self, stub: Any, reference: Reference) -> None:
        self._stub = stub
        self._reference = reference

    def Get(self, request: artifacts_pb2.GetRequest) -> Any:
        return self._stub.Fetch(request, metadata=metadata(self._reference))


class PeerClient:
    """`book` is None until this node has joined."""

    def __init__(self, credential: Callable[[], Awaitable[Credential]], capacity: Callable[[], Capacity]) -> None:
        self.book: RosterBook | None = None
        self._credential = credential
        self._capacity = capacity
        self._avoided: dict[str, float] = {}  # node -> until, monotonic

    async def fetch(self, digest: Digest, destination: Path, n_bytes: int) -> bool:
        """True when a peer gave the file. False: none has it, or none that answers; what came in part is kept."""
        if self.book is None or n_bytes < SMALLEST_BYTES:
            return False
        tried = 0
        for reference, member in self.book.sources(digest, time.time()):
            addresses = reachable(member, self._capacity())
            if not addresses or self._avoided.get(member.node_id, 0.0) > time.monotonic():
                continue
            try:
                await self.fetch_from(member, addresses, reference, digest, destination, n_bytes)
                log.info("fetched from a peer", peer=member.node_id, digest=digest, bytes=n_bytes)
                return True
            except HiveError as error:
                if error.code is not ErrorCode.NOT_FOUND:
                    self._avoided[member.node_id] = time.monotonic() + _AVOID_S
                    log.info("not fetched from a peer", peer=member.node_id, digest=digest, code=error.code.value)
            tried += 1
            if tried >= _MAX_SOURCES:
                break
        return False

    async def fetch_from(
        self,
        member: Member,
        addresses: Sequence[PeerAddress],
        reference: Reference,
        digest: Digest,
        destination: Path,
        n_bytes: int,
        attempts: int = 1,
    ) -> None:
        """One file from one member. Raises HiveError; with more `attempts` it goes on where the stream broke."""
        async with connected(await self._credential(), member.node_id, addresses) as (stub, _):
            source = PeerSource(stub, reference)
            await transfer.get_file(source, digest, destination, n_bytes, attempts=attempts)
