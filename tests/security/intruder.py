"""A member of the cluster that speaks the session protocol by hand, to say what no honest node would say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from node import probe
from protos import dial, documents, version
from protos.credentials import Credential
from protos.errors import HiveError
from protos.gen import artifacts_pb2_grpc, jobs_pb2_grpc, membership_pb2_grpc
from protos.gen import membership_pb2 as pb
from protos.work import HeldLease

ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Stubs:
    """Every service of the session port, as one credential's holder."""

    jobs: Any
    membership: Any
    artifacts: Any


@contextlib.asynccontextmanager
async def calling(address: str, credential: Credential) -> AsyncIterator[Stubs]:
    """Calls inside raise HiveError."""
    async with dial.channel(address, credential) as line:
        with dial.errors_of(address):
            yield Stubs(
                jobs_pb2_grpc.JobsStub(line),  # type: ignore[no-untyped-call]
                membership_pb2_grpc.MembershipStub(line),  # type: ignore[no-untyped-call]
                artifacts_pb2_grpc.ArtifactsStub(line),  # type: ignore[no-untyped-call]
            )


def hello(name: str, spool_id: str, leases: tuple[HeldLease, ...] = ()) -> pb.NodeMessage:
    capacity = probe.capacity(Path("/"))
    return pb.NodeMessage(
        hello=pb.Hello(
            protocol=version.PROTOCOL,
            minimum_protocol=version.MINIMUM_PROTOCOL,
            software=version.SOFTWARE,
            name=name,
            capacity_json=documents.encode(capacity),
            leases_json=documents.encode_as(tuple[HeldLease, ...], leases),
            spool_id=spool_id,
            activity="PAUSED",
            activity_reason="takes no work",
        )
    )


async def _greeted(stubs: Any, first: pb.NodeMessage) -> tuple[Any, Any]:
    """The stream and what it was answered. A refusal that comes before the first message is on its way is lost in the
    library, which then says INTERNAL: asked again."""
    for tries_left in reversed(range(10)):
        stream = stubs.membership.Attach()
        try:
            await stream.write(first)
            answer = await asyncio.wait_for(stream.read(), ANSWER_S)
            if answer is grpc.aio.EOF:  # type: ignore[attr-defined]
                await stream  # raises what ended it
        except grpc.aio.AioRpcError as error:
            stream.cancel()
            if not tries_left or error.details() != "Internal error from Core":
                raise
        else:
            return stream, answer
    raise AssertionError("not reached")


class Intruder:
    """One open session stream. `ended` tells how it was refused."""

    def __init__(self, stream: Any, address: str, welcome: pb.Welcome) -> None:
        self._stream = stream
        self._address = address
        self.welcome = welcome

    @classmethod
    @contextlib.asynccontextmanager
    async def attached(cls, address: str, credential: Credential, first: pb.NodeMessage) -> AsyncIterator[Intruder]:
        async with calling(address, credential) as stubs:
            stream, answer = await _greeted(stubs, first)
            try:
                yield cls(stream, address, answer.welcome)
            finally:
                stream.cancel()

    async def say(self, message: pb.NodeMessage) -> None:
        await self._stream.write(message)

    async def durable(self, message: pb.Durable) -> None:
        """Said, and acknowledged."""
        await self.say(pb.NodeMessage(durable=message))
        while (await self._heard("acknowledged")).acknowledged.seq < message.seq:
            pass

    async def store(self, call: Any) -> Any:
        await self.say(pb.NodeMessage(store_call=call))
        return (await self._heard("store_reply")).store_reply

    async def _heard(self, kind: str) -> pb.CoordinatorMessage:
        async with asyncio.timeout(ANSWER_S):
            while (message := await self._stream.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                if message.WhichOneof("body") == kind:
                    return message  # type: ignore[no-any-return]
        raise AssertionError(f"the stream ended before {kind}")

    async def ended(self, within_s: float) -> HiveError | None:
        """How the coordinator ended the stream; None for a plain end. Raises TimeoutError when it did not."""
        try:
            async with asyncio.timeout(within_s):
                while await self._stream.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
                    pass
                await self._stream.code()
        except grpc.aio.AioRpcError as error:
            return dial.error_from(error, self._address)
        return None
