"""How good the link to another node is: round trips of small messages, then streams that grow until they take a while.

Owns the measurement, seen from the node that calls. Bounded: `MAX_PROBE_BYTES` and about half a second each way on any
link; a link so slow that the smallest stream takes longer than its deadline is not measured. Both directions one after
the other, under both owners' upload caps.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import grpc
import grpc.aio

from node.peer import MAX_PROBE_BYTES, probe_content
from node.peer_client import connected, error_of, metadata
from protos.credentials import Credential
from protos.gen import peer_pb2 as pb
from protos.roster import Member, PeerAddress, Reference
from protos.transfer import Limiter

ECHOES = 12
ENOUGH_S = 0.25
FIRST_BYTES = 64 * 1024
_LARGEST_GROWTH = 8
_ECHO_BYTES = 64
_CALL_S = 10.0
_SHORTEST_S = 1e-5


@dataclass(frozen=True, slots=True)
class Measured:
    """Seen from the node that called. Rates in bytes per second."""

    rtt_minimum_s: float
    rtt_median_s: float
    upload_bytes_per_s: float
    download_bytes_per_s: float
    network: str


async def measure(
    credential: Credential,
    member: Member,
    addresses: Sequence[PeerAddress],
    reference: Reference,
    limiter: Limiter | None,
) -> Measured:
    """Raises HiveError: Unreachable, or what the other node refused with."""
    async with connected(credential, member.node_id, addresses) as (stub, used):
        try:
            rtts = [await _echo_s(stub, reference) for _ in range(ECHOES + 1)][1:]  # the first one warms the way
            least = min(rtts)
            upload = await rate(lambda n_bytes: _upload_s(stub, reference, n_bytes, limiter), least)
            download = await rate(lambda n_bytes: _download_s(stub, reference, n_bytes), least)
        except grpc.RpcError as error:
            raise error_of(error, member.node_id, used.address) from None
    return Measured(least, median(rtts), upload, download, used.network)


async def rate(transfer_s: Callable[[int], Awaitable[float]], rtt_s: float) -> float:
    """Bytes per second of the largest of a few growing transfers, the round trip subtracted."""
    size, left = FIRST_BYTES, MAX_PROBE_BYTES
    while True:
        elapsed_s = await transfer_s(size)
        left -= size
        found = size / max(elapsed_s - rtt_s, elapsed_s / 10, _SHORTEST_S)
        if elapsed_s >= ENOUGH_S or left < size:
            return found
        size = next_size(size, found, left)


def next_size(size: int, found_bytes_per_s: float, left: int) -> int:
    """What should take just long enough, at most eight times as much as before, and no more than is left. Pure."""
    return min(left, max(2 * size, min(_LARGEST_GROWTH * size, int(1.2 * ENOUGH_S * found_bytes_per_s))))


async def _echo_s(stub: Any, reference: Reference) -> float:
    request = pb.PeerEcho(content=bytes(_ECHO_BYTES))
    started_s = time.perf_counter()
    await stub.Echo(request, timeout=_CALL_S, metadata=metadata(reference))
    return time.perf_counter() - started_s


async def _upload_s(stub: Any, reference: Reference, n_bytes: int, limiter: Limiter | None) -> float:
    started_s = time.perf_counter()

    async def chunks() -> AsyncIterator[pb.PeerBytes]:
        async for content in probe_content(n_bytes, limiter):
            yield pb.PeerBytes(content=content)

    await stub.Upload(chunks(), timeout=_CALL_S, metadata=metadata(reference))
    return time.perf_counter() - started_s


async def _download_s(stub: Any, reference: Reference, n_bytes: int) -> float:
    started_s = time.perf_counter()
    call = stub.Download(pb.PeerWanted(bytes=n_bytes), timeout=_CALL_S, metadata=metadata(reference))
    try:
        while (await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            pass
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            initial, trailing = await call.initial_metadata(), await call.trailing_metadata()
            raise grpc.aio.AioRpcError(code, initial, trailing, await call.details(), None)
    finally:
        call.cancel()
    return time.perf_counter() - started_s
