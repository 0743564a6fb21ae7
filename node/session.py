"""The one outgoing stream to the coordinator: dial, say hello, keep alive, send what waits, reconnect with jitter.

Owns the connection and the order of sending. What messages mean is the daemon's; what must survive a broken stream lies
in the spool. Invariants: numbered messages are taken from the spool by the writer alone, so on every connection each
goes out once and in order, whatever else waits or was dropped; everything else is best effort; only a refusal by the
coordinator ends `run`, no failure of this machine or of the network does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from node.cancellation import raise_if_cancelled
from node.spool import Spool
from protos import dial, limits
from protos.credentials import Credential
from protos.errors import AccessError, DeadlineExceeded, ErrorCode, HiveError, SpecError, Unreachable
from protos.gen import membership_pb2 as pb
from protos.gen import membership_pb2_grpc
from protos.log import Log

log = Log("hive.node.session")

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 3.0
_WELCOME_S = 10.0
_MAX_QUEUED = 10_000
_ENVELOPE_BYTES = 1024
_REFUSALS = (ErrorCode.UNAUTHENTICATED, ErrorCode.FORBIDDEN, ErrorCode.VERSION_MISMATCH)


@dataclass(slots=True, eq=False)
class _Line:
    """What waits to be written on one connection beside the spool. `last`: nothing comes after it."""

    queue: deque[pb.NodeMessage] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    last: bool = False


@dataclass(slots=True, eq=False)
class Session:
    """`hello` makes the first message, `connected` is told after each welcome, `handle` takes every later message but
    acknowledgements: those become `delivered`, once for each numbered message. None of them may raise."""

    credential: Callable[[], Awaitable[Credential]]
    hello: Callable[[], pb.Hello]
    handle: Callable[[pb.CoordinatorMessage], Awaitable[None]]
    delivered: Callable[[pb.Durable], None]
    beat: Callable[[], pb.Heartbeat]
    connected: Callable[[], None]
    spool: Spool
    rtt_s: float | None = None
    problem: str = "not connected yet"
    _line: _Line | None = None
    _heard_s: float = 0.0
    _beats: int = 0
    _finishing: bool = False
    _welcome: pb.Welcome = field(default_factory=pb.Welcome)

    @property
    def is_connected(self) -> bool:
        return self._line is not None

    @property
    def connection(self) -> object:
        """A different object for every connection."""
        return self._line

    def send(self, message: pb.NodeMessage) -> bool:
        """Queue a message on the open stream; False (and dropped) when there is none, or none that moves."""
        line = self._line
        if line is None or line.last or len(line.queue) >= _MAX_QUEUED:
            return False
        line.queue.append(message)
        line.changed.set()
        return True

    def send_heartbeat(self) -> None:
        """Now, and not only when the next one is due: what it says has changed. Its echo measures the way."""
        beat = self.beat()
        self._beats += 1
        beat.number, beat.sent_s = self._beats, time.monotonic()
        self.send(pb.NodeMessage(heartbeat=beat))

    def send_durable(self, message: pb.Durable) -> None:
        """Into the spool, and on its way when connected; otherwise with the next connection. Raises SpecError for one
        that no stream would carry, OSError when the disk does not take it."""
        if message.ByteSize() > limits.MAX_MESSAGE_BYTES - _ENVELOPE_BYTES:
            raise SpecError(f"a message of {message.ByteSize()} bytes is over the limit of {limits.MAX_MESSAGE_BYTES}")
        if self.spool.append(message) is not None and self._line is not None:
            self._line.changed.set()

    async def finish(self, message: pb.NodeMessage) -> None:
        """The last word: returns when the coordinator has read it and closed the stream, at once without a stream."""
        self._finishing = True
        line = self._line
        if line is not None:
            line.queue.append(message)
            line.last = True
            line.changed.set()
            await line.ended.wait()

    async def run(self) -> None:
        """Until cancelled or finished. Raises AccessError when the coordinator refuses this node for good."""
        tries = 0
        while not self._finishing:
            before_s = self._heard_s
            try:
                await self._once()
                self.problem = "the coordinator closed the stream"
            except HiveError as error:
                self.problem = error.message
                if error.code in _REFUSALS:
                    raise
                log.info("disconnected", reason=error.message)
            except Exception as error:  # a full disk, a bug: the workers that run are worth more than this attempt
                self.problem = f"{type(error).__name__}: {error}"
                log.exception("session failed")
            raise_if_cancelled()
            tries = 0 if self._heard_s != before_s else tries + 1
            if not self._finishing:
                longest_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(tries + 1, 10))
                await asyncio.sleep(random.uniform(_FIRST_WAIT_S, longest_s))  # jitter: not all nodes at once

    async def _once(self) -> None:
        credential = await self.credential()
        async with dial.channel(credential.session_address, credential) as channel:
            stub: Any = membership_pb2_grpc.MembershipStub(channel)  # type: ignore[no-untyped-call]
            stream = stub.Attach()
            try:
                await self._converse(stream)
            except grpc.aio.AioRpcError as error:
                raise _meaning(error, credential.session_address) from None
            finally:
                line, self._line = self._line, None
                if line is not None:
                    line.ended.set()
                stream.cancel()

    async def _converse(self, stream: Any) -> None:
        await self._greet(stream)
        line = self._line = _Line()
        self.problem = ""
        self.connected()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(stream, line, self._welcome.acknowledged_seq))
                group.create_task(self._keep_alive())
                await self._read(stream)
                raise _Ended
        except* _Ended:
            pass
        except* (grpc.aio.AioRpcError, HiveError) as failures:
            raise _first(failures) from None
        await self._raise_status(stream)

    async def _greet(self, stream: Any) -> None:
        first: Any = _EOF
        try:
            async with asyncio.timeout(_WELCOME_S):
                with contextlib.suppress(asyncio.InvalidStateError):  # ended while we wrote: its status says why
                    await stream.write(pb.NodeMessage(hello=self.hello()))
                    first = await stream.read()
        except TimeoutError:
            raise DeadlineExceeded("the coordinator did not answer hello in time") from None
        if first is _EOF:
            await self._raise_status(stream)
        if first is _EOF or first.WhichOneof("body") != "welcome":
            raise Unreachable("the coordinator did not answer hello with welcome", "is it a different version?")
        self._welcome = first.welcome
        self._heard_s = time.monotonic()
        self._forget(self._welcome.acknowledged_seq)

    def _forget(self, acknowledged_seq: int) -> None:
        for message in self.spool.acknowledge(acknowledged_seq):
            self.delivered(message)

    async def _raise_status(self, stream: Any) -> None:
        code = await stream.code()
        if code is not grpc.StatusCode.OK:
            initial, trailing = await stream.initial_metadata(), await stream.trailing_metadata()
            raise grpc.aio.AioRpcError(code, initial, trailing, await stream.details(), None)

    async def _write(self, stream: Any, line: _Line, sent_seq: int) -> None:
        """Numbered messages in order, each once; what is queued goes between them, so that a long backlog does not
        hold up heartbeats."""
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # the reader learns why
            while True:
                line.changed.clear()
                await _flush(stream, line)
                for durable in self.spool.waiting(sent_seq):
                    await stream.write(pb.NodeMessage(durable=durable))
                    sent_seq = durable.seq
                    await _flush(stream, line)
                if line.last:
                    await stream.done_writing()
                    return
                await line.changed.wait()

    async def _read(self, stream: Any) -> None:
        while (message := await stream.read()) is not _EOF:
            self._heard_s = time.monotonic()
            match message.WhichOneof("body"):
                case "echo":
                    rtt_s = time.monotonic() - message.echo.sent_s
                    self.rtt_s = rtt_s if self.rtt_s is None else min(rtt_s, 0.8 * self.rtt_s + 0.2 * rtt_s)
                case "acknowledged":
                    self._forget(message.acknowledged.seq)
                case _:
                    await self.handle(message)

    async def _keep_alive(self) -> None:
        """Heartbeats; a coordinator that says nothing for twice the lease's life is taken for gone."""
        patience_s = 2 * (self._welcome.lease_ttl_s or limits.LEASE_TTL_S)
        while True:
            self.send_heartbeat()
            await asyncio.sleep(self._welcome.heartbeat_s or limits.HEARTBEAT_S)
            if time.monotonic() - self._heard_s > patience_s:
                raise Unreachable(f"the coordinator has said nothing for {patience_s:.0f} s", "it may be frozen")


async def _flush(stream: Any, line: _Line) -> None:
    while line.queue:
        await stream.write(line.queue.popleft())


def _meaning(error: grpc.aio.AioRpcError, address: str) -> HiveError:
    """As dial says; but what merely answers at the address is nobody who could refuse this node: the coordinator may
    have moved, and is looked for again."""
    meant = dial.error_from(error, address)
    if isinstance(meant, AccessError) and error.code() is grpc.StatusCode.UNAVAILABLE:
        return Unreachable(meant.message, meant.hint)
    return meant


def _first(failures: BaseExceptionGroup[Any]) -> Exception:
    error = failures.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


class _Ended(Exception):
    """Leaves the task group of one conversation."""


__all__ = ["Session"]
