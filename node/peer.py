"""What a node serves to other nodes: echoes and bytes for the probes, files by digest; a listener per trusted address.

Owns the listeners and who is let in: mutual TLS with certificates of our authority, then a roster this node holds that
lists the caller. Refuses everything else, also while it works (probes) or when enough is under way. Invariants: fails
closed; the roster is asked again with every chunk; what is sent obeys the owner's upload cap; a renewed certificate is
taken up without closing a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import grpc
import grpc.aio

from node.memory_trim import trim
from node.peer_files import PeerFiles
from node.roster_book import Caller, RosterBook
from protos import dial, limits
from protos.credentials import Credential
from protos.errors import AccessError, Conflict, DeadlineExceeded, ErrorCode, Exhausted, HiveError, SpecError
from protos.gen import artifacts_pb2, peer_pb2_grpc
from protos.gen import peer_pb2 as pb
from protos.log import Log
from protos.refusal import abort
from protos.roster import METADATA_KEY, Action, Reference, Roster, can_serve, key_sha256, parse_reference
from protos.token import Role
from protos.transfer import Limiter

log = Log("hive.node.peer")

MAX_PROBE_BYTES = 32 * 1024 * 1024
PROBE_CHUNK_BYTES = 64 * 1024
MAX_ECHO_BYTES = 1024
MAX_STREAMS = 4  # of files, at once
_IDLE_S = 10.0
_STOP_GRACE_S = 0.5
_TRIM_S = 1.0
_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    ("grpc.max_connection_idle_ms", 120_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
)


@dataclass(slots=True, eq=False)
class PeerService(peer_pb2_grpc.PeerServicer):
    """The four calls. `book` is None until this node has joined; `busy` says whether a job runs here."""

    book: RosterBook | None
    files: PeerFiles
    limiter: Limiter | None
    busy: Callable[[], bool]
    clock: Callable[[], float] = time.time
    _streams: int = 0
    _probing: bool = False
    _trimming: asyncio.TimerHandle | None = None

    async def Echo(self, request: pb.PeerEcho, context: Any) -> pb.PeerEcho:
        async with _errors(context):
            self._admit(context, Action.PROBE)
            self._check_quiet()
            if len(request.content) > MAX_ECHO_BYTES:
                raise _too_much(len(request.content), MAX_ECHO_BYTES)
            return request

    async def Upload(self, requests: AsyncIterator[pb.PeerBytes], context: Any) -> pb.PeerReceived:
        async with _errors(context):
            received = 0
            with self._one_probe(context):
                while (chunk := await _next(requests)) is not None:
                    received += len(chunk.content)
                    if received > MAX_PROBE_BYTES:
                        raise _too_much(received, MAX_PROBE_BYTES)
                    self._check_quiet()
            return pb.PeerReceived(bytes=received)

    async def Download(self, request: pb.PeerWanted, context: Any) -> None:
        async with _errors(context):
            with self._one_probe(context):
                if request.bytes > MAX_PROBE_BYTES:
                    raise _too_much(request.bytes, MAX_PROBE_BYTES)
                async for content in probe_content(request.bytes, self.limiter):
                    self._check_quiet()
                    await context.write(pb.PeerBytes(content=content))

    async def Fetch(self, request: artifacts_pb2.GetRequest, context: Any) -> None:
        async with _errors(context):
            book, reference, caller = self._who(context)
            roster = book.admit(reference, caller, Action.FETCH, self.clock())
            book.check_digest(roster, request.digest)
            if self._streams >= MAX_STREAMS:
                raise Exhausted(f"{MAX_STREAMS} transfers are under way here", "ask another member, or the coordinator")
            self._streams += 1
            try:
                file, total = await asyncio.to_thread(self.files.open, request.digest, roster.subject)
                with file:
                    await self._send(file, total, request, context)
            finally:
                self._streams -= 1

    async def _send(self, file: BinaryIO, total: int, request: artifacts_pb2.GetRequest, context: Any) -> None:
        """From the offset on, as far as was asked; the roster may end meanwhile."""
        offset = request.offset
        if offset > total or request.limit_bytes > total:
            raise SpecError(f"{request.limit_bytes} bytes from {offset} on are beyond the {total} of {request.digest}")
        end = total if request.limit_bytes == 0 else min(total, offset + request.limit_bytes)
        await asyncio.to_thread(file.seek, offset)
        while True:
            content = await asyncio.to_thread(file.read, min(limits.CHUNK_BYTES, end - offset))
            if self.limiter is not None:
                await self.limiter.take(len(content))
            self._admit(context, Action.FETCH)
            await context.write(artifacts_pb2.GetChunk(offset=offset, content=content, total_bytes=total))
            offset += len(content)
            if offset >= end or not content:
                return

    def _who(self, context: Any) -> tuple[RosterBook, Reference, Caller]:
        if self.book is None:
            raise AccessError("this node has not joined a cluster", "try again later", code=ErrorCode.FORBIDDEN)
        return self.book, _reference(context), caller_of(context.auth_context())

    def _admit(self, context: Any, action: Action) -> Roster:
        book, reference, caller = self._who(context)
        return book.admit(reference, caller, action, self.clock())

    def _check_quiet(self) -> None:
        if self.busy():
            raise Conflict("this node works on a job: its links are not probed now", "it is asked again when idle")

    @contextlib.contextmanager
    def _one_probe(self, context: Any) -> Iterator[None]:
        """Two at once would measure each other."""
        self._admit(context, Action.PROBE)
        self._check_quiet()
        if self._probing:
            raise Exhausted("this node is being probed by another", "the coordinator asks for one at a time")
        self._probing = True
        try:
            yield
        finally:
            self._probing = False
            if self._trimming is not None:
                self._trimming.cancel()
            self._trimming = asyncio.get_running_loop().call_later(_TRIM_S, trim)  # not while the caller measures


class PeerListeners:
    """The service on every address that is wanted, all on one port. `port` None: it serves nobody, see `problem`."""

    def __init__(self, service: PeerService, port: int = 0) -> None:
        self.port: int | None = None
        self.problem = "not opened yet"
        self._service = service
        self._wanted_port = port
        self._servers: dict[str, Any] = {}
        self._credential: Credential | None = None

    async def follow(self, credential: Credential, addresses: Iterable[str]) -> None:
        """Listen there and nowhere else, as the holder of this credential. What cannot be bound is tried next time."""
        self._credential = credential
        if not can_serve(credential.certificate_pem.encode(), credential.id):
            await self.close()
            self.problem = "its certificate is of an older version: a new one comes within 12 hours"
            return
        wanted = dict.fromkeys(addresses)
        for address in [address for address in self._servers if address not in wanted]:
            await self._servers.pop(address).stop(_STOP_GRACE_S)
        failed = [address for address in wanted if address not in self._servers and not await self._listen(address)]
        if not self._servers:
            self.port = None
        port = self.port or self._wanted_port
        problem = f"cannot listen on {', '.join(failed)} port {port or '(any)'}" if failed else ""
        if problem and problem != self.problem:
            log.warning("peers cannot reach this node everywhere", reason=problem, hint="see --peer-port")
        self.problem = problem

    async def close(self) -> None:
        servers, self._servers = list(self._servers.values()), {}
        self.port = None
        await asyncio.gather(*(server.stop(_STOP_GRACE_S) for server in servers))
        self.problem = "closed"

    async def _listen(self, address: str) -> bool:
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=64)
        peer_pb2_grpc.add_PeerServicer_to_server(self._service, server)  # type: ignore[no-untyped-call]
        secrets = grpc.dynamic_ssl_server_credentials(
            self._identity(), self._identity, require_client_authentication=True
        )
        try:
            bound = server.add_secure_port(dial.join_address(address, self.port or self._wanted_port), secrets)
        except RuntimeError:
            bound = 0
        if not bound:
            return False
        await server.start()
        self._servers[address] = server
        self.port = bound
        return True

    def _identity(self) -> Any:
        """Asked at every handshake: the certificate is renewed under an open listener."""
        credential = self._credential
        assert credential is not None  # set before the first listener
        chain = (credential.certificate_pem + credential.ca_pem).encode()
        return grpc.ssl_server_certificate_configuration(
            [(credential.key_pem.encode(), chain)], root_certificates=credential.ca_pem.encode()
        )


async def probe_content(n_bytes: int, limiter: Limiter | None) -> AsyncIterator[bytes]:
    """So many bytes in chunks, as fast as the owner's upload cap lets them go."""
    content = os.urandom(min(n_bytes, PROBE_CHUNK_BYTES))  # nothing on the way can make it smaller
    while n_bytes > 0:
        chunk = content[:n_bytes]
        if limiter is not None:
            await limiter.take(len(chunk))
        yield chunk
        n_bytes -= len(chunk)


def caller_of(auth_context: Any) -> Caller:
    """The node behind a verified certificate. Raises AccessError for anything but a node of our authority."""
    for entry in auth_context.get("x509_subject_alternative_name", ()):
        kind, _, rest = entry.decode(errors="replace").partition(":")
        role, _, subject = rest.partition(":")
        if kind == "hive" and role == Role.NODE and subject:
            return Caller(subject, key_sha256(auth_context["x509_pem_cert"][0]))
    raise AccessError("only nodes may call a node", "ask the coordinator", code=ErrorCode.FORBIDDEN)


def _reference(context: Any) -> Reference:
    for key, value in context.invocation_metadata() or ():
        if key == METADATA_KEY and isinstance(value, str):
            return parse_reference(value)
    raise AccessError("the call names no roster", "is the other side a different version?", code=ErrorCode.FORBIDDEN)


async def _next(requests: AsyncIterator[pb.PeerBytes]) -> pb.PeerBytes | None:
    try:
        async with asyncio.timeout(_IDLE_S):
            return await anext(requests, None)
    except TimeoutError:
        raise DeadlineExceeded(f"nothing came for {_IDLE_S:g} s", "the link is too slow to be measured") from None


def _too_much(asked: int, allowed: int) -> SpecError:
    return SpecError(f"{asked} bytes are over the limit of {allowed}", "is the other side a different version?")


@contextlib.asynccontextmanager
async def _errors(context: Any) -> AsyncIterator[None]:
    try:
        yield
    except HiveError as error:
        await abort(context, error)
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("a peer's call failed")
        await abort(context, HiveError("this node failed while answering", "see its log"))


__all__ = ["MAX_PROBE_BYTES", "MAX_STREAMS", "PeerListeners", "PeerService", "caller_of", "probe_content"]
