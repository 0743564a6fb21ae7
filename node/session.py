"""The one outgoing stream to the coordinator: dial, say hello, keep alive, send what waits, reconnect with jitter.

Owns the connection only. What messages mean is the daemon's; what must survive a broken stream lies in the spool.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog

from node.spool import Spool
from protos import dial
from protos.credentials import Credential
from protos.errors import TABLE, AccessError, DeadlineExceeded, ErrorCode, HiveError, Unreachable
from protos.gen import membership_pb2 as pb
from protos.gen import membership_pb2_grpc

log = structlog.get_logger()

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 3.0
_WELCOME_S = 10.0
_MAX_QUEUED = 10_000


@dataclass(slots=True, eq=False)
class Session:
    """`hello` makes the first message, `handle` takes every later one, `connected` is told after each welcome."""

    credential: Callable[[], Awaitable[Credential]]
    hello: Callable[[], pb.Hello]
    handle: Callable[[pb.CoordinatorMessage], Awaitable[None]]
    beat: Callable[[], pb.Heartbeat]
    connected: Callable[[], None]
    spool: Spool
    rtt_s: float | None = None
    problem: str = "not connected yet"
    _outgoing: asyncio.Queue[pb.NodeMessage] | None = None
    _heard_s: float = 0.0
    _welcome: pb.Welcome = field(default_factory=pb.Welcome)

    @property
    def is_connected(self) -> bool:
        return self._outgoing is not None

    @property
    def connection(self) -> object:
        """A different object for every connection."""
        return self._outgoing

    async def drained(self) -> None:
        """Returns when what was queued on the open stream has been written, or there is no stream."""
        if self._outgoing is not None:
            await self._outgoing.join()

    def send(self, message: pb.NodeMessage) -> bool:
        """Queue a message on the open stream; False (and dropped) when there is none."""
        if self._outgoing is None:
            return False
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            return False
        return True

    def send_durable(self, message: pb.Durable) -> None:
        """Into the spool, and on its way when connected; otherwise with the next connection."""
        stored = self.spool.append(message)
        if stored is not None:
            self.send(pb.NodeMessage(durable=stored))

    async def run(self) -> None:
        """Until cancelled. Raises AccessError when the coordinator refuses this node for good."""
        tries = 0
        while True:
            try:
                await self._once()
                tries = 0
                self.problem = "the coordinator closed the stream"
            except HiveError as error:
                self.problem = error.message
                if error.code in (ErrorCode.UNAUTHENTICATED, ErrorCode.FORBIDDEN, ErrorCode.VERSION_MISMATCH):
                    raise
                log.info("disconnected", reason=error.message, retryable=TABLE[error.code].retryable)
            tries += 1
            longest_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(tries, 10))
            await asyncio.sleep(random.uniform(_FIRST_WAIT_S, longest_s))  # jitter: not all nodes at once

    async def _once(self) -> None:
        credential = await self.credential()
        async with dial.channel(credential.session_address, credential) as channel:
            stub: Any = membership_pb2_grpc.MembershipStub(channel)  # type: ignore[no-untyped-call]
            stream = stub.Attach()
            try:
                await self._converse(stream)
            except grpc.aio.AioRpcError as error:
                raise dial.error_from(error, credential.session_address) from None
            finally:
                self._outgoing = None
                stream.cancel()

    async def _converse(self, stream: Any) -> None:
        try:
            async with asyncio.timeout(_WELCOME_S):
                await stream.write(pb.NodeMessage(hello=self.hello()))
                first = await stream.read()
        except TimeoutError:
            raise DeadlineExceeded("the coordinator did not answer hello in time") from None
        except asyncio.InvalidStateError:  # the call ended while we wrote: its status says why
            first = _EOF
        if first is _EOF:
            await self._raise_status(stream)
        self._welcome = first.welcome
        self._heard_s = time.monotonic()
        for message in self.spool.acknowledge(self._welcome.acknowledged_seq):
            log.debug("accepted before", seq=message.seq)
        outgoing: asyncio.Queue[pb.NodeMessage] = asyncio.Queue(maxsize=_MAX_QUEUED)
        waiting = self.spool.waiting()
        self._outgoing = outgoing
        self.problem = ""
        self.connected()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(stream, waiting, outgoing))
                group.create_task(self._keep_alive(stream))
                await self._read(stream)
                raise _Ended
        except* _Ended:
            pass
        except* grpc.aio.AioRpcError as failures:
            raise _first(failures) from None
        await self._raise_status(stream)

    async def _raise_status(self, stream: Any) -> None:
        code = await stream.code()
        if code is not grpc.StatusCode.OK:
            initial, trailing = await stream.initial_metadata(), await stream.trailing_metadata()
            raise grpc.aio.AioRpcError(code, initial, trailing, await stream.details(), None)

    async def _write(
        self,
        stream: Any,
        waiting: list[pb.Durable],
        outgoing: asyncio.Queue[pb.NodeMessage],
    ) -> None:
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            for durable in waiting:
                await stream.write(pb.NodeMessage(durable=durable))
            while True:
                await stream.write(await outgoing.get())
                outgoing.task_done()

    async def _read(self, stream: Any) -> None:
        while (message := await stream.read()) is not _EOF:
            self._heard_s = time.monotonic()
            if message.WhichOneof("body") == "echo":
                rtt_s = time.monotonic() - message.echo.sent_s
                self.rtt_s = rtt_s if self.rtt_s is None else min(rtt_s, 0.8 * self.rtt_s + 0.2 * rtt_s)
            else:
                await self.handle(message)

    async def _keep_alive(self, stream: Any) -> None:
        """Heartbeats; a coordinator that echoes nothing for twice the lease's life is taken for gone."""
        number = 0
        while True:
            number += 1
            beat = self.beat()
            beat.number, beat.sent_s = number, time.monotonic()
            self.send(pb.NodeMessage(heartbeat=beat))
            await asyncio.sleep(self._welcome.heartbeat_s or 1.0)
            if time.monotonic() - self._heard_s > 2 * (self._welcome.lease_ttl_s or 5.0):
                stream.cancel()
                raise _Ended


def _first(failures: BaseExceptionGroup[grpc.aio.AioRpcError]) -> grpc.aio.AioRpcError:
    error = failures.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


class _Ended(Exception):
    """Leaves the task group of one conversation."""


__all__ = ["AccessError", "Session", "Unreachable"]
