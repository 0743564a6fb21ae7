"""The node's stream against a coordinator of our own making, over real TLS on loopback: order, outages, endings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from coordinator import listeners
from coordinator.authority import Authority, open_authority
from coordinator.interceptors import caller
from node.session import Session
from node.spool import Spool
from protos.credentials import Credential
from protos.errors import AccessError, Conflict, Exhausted, HiveError, SpecError, Unreachable
from protos.gen import membership_pb2 as pb
from protos.gen import membership_pb2_grpc, work_pb2
from protos.token import Role


@dataclass(eq=False)
class Stream:
    """One stream as the coordinator sees it."""

    hello: pb.Hello
    messages: Any
    context: Any
    caller: str
    heard: list[pb.NodeMessage] = field(default_factory=list)
    ends: asyncio.Future[HiveError | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def say(self, **body: Any) -> None:
        await self.context.write(pb.CoordinatorMessage(**body))

    async def acknowledge(self, seq: int) -> None:
        await self.say(acknowledged=pb.Acknowledged(seq=seq))

    async def hear(self, kind: str = "durable") -> Any:
        """The next message of a kind; the others wait until they are asked for."""
        for at, message in enumerate(self.heard):
            if message.WhichOneof("body") == kind:
                return getattr(self.heard.pop(at), kind)
        async for message in self.messages:
            if message.WhichOneof("body") == kind:
                return getattr(message, kind)
            self.heard.append(message)
        raise AssertionError(f"the stream ended without {kind}")

    async def everything(self) -> AsyncIterator[str]:
        """The kinds of all messages in the order they came, until the stream ends."""
        for message in self.heard:
            yield message.WhichOneof("body") or ""
        async for message in self.messages:
            yield message.WhichOneof("body") or ""

    def end(self, error: HiveError | None = None) -> None:
        self.ends.set_result(error)


class FarSide(membership_pb2_grpc.MembershipServicer):
    """A coordinator whose every word the test says. `refuse` answers hello, `deaf` does not answer at all."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()
        self.hellos: asyncio.Queue[pb.Hello] = asyncio.Queue()
        self.acknowledged = 0
        self.lease_ttl_s = 5.0
        self.refuse: HiveError | None = None

    async def Attach(self, messages: Any, context: Any) -> None:
        hello = (await anext(aiter(messages))).hello
        self.hellos.put_nowait(hello)
        if self.refuse is not None:
            raise self.refuse
        stream = Stream(hello, messages, context, caller(context).id)
        welcome = pb.Welcome(
            protocol=1, heartbeat_s=0.02, lease_ttl_s=self.lease_ttl_s, acknowledged_seq=self.acknowledged
        )
        await stream.say(welcome=welcome)
        self.streams.put_nowait(stream)
        error = await stream.ends
        if error is not None:
            raise error

    async def next(self) -> Stream:
        """The next stream, once the node has read its welcome and said something more."""
        stream = await self.streams.get()
        await stream.hear("heartbeat")
        return stream


@dataclass
class Node:
    session: Session
    spool: Spool
    delivered: list[int] = field(default_factory=list)
    handled: list[str] = field(default_factory=list)
    connections: list[object] = field(default_factory=list)
    running: asyncio.Task[None] | None = None
    on_message: Callable[[], None] = lambda: None

    def line(self, text: str) -> None:
        self.session.send_durable(pb.Durable(job_id="j-1", fence=1, logs=work_pb2.LogLines(lines=[text])))


@dataclass
class House:
    far: FarSide
    authority: Authority
    credential: Credential
    folder: Path
    credentials: list[Credential | Exception] = field(default_factory=list)

    def node(self, hello: Callable[[], pb.Hello] = lambda: pb.Hello(name="n")) -> Node:
        async def credential() -> Credential:
            given = self.credentials.pop(0) if self.credentials else self.credential
            if isinstance(given, Exception):
                raise given
            return given

        async def handle(message: pb.CoordinatorMessage) -> None:
            made.handled.append(message.WhichOneof("body") or "")
            made.on_message()

        spool = Spool(self.folder / "spool")
        made = Node(None, spool)  # type: ignore[arg-type]
        made.session = Session(
            credential,
            hello,
            handle,
            lambda durable: made.delivered.append(durable.seq),
            pb.Heartbeat,
            lambda: made.connections.append(made.session.connection),
            spool,
        )
        return made


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[House]:
    far, authority = FarSide(), open_authority(folder)

    async def anyone(member_id: str) -> bool:
        return True

    server = listeners.session_server(anyone)
    membership_pb2_grpc.add_MembershipServicer_to_server(far, server)  # type: ignore[no-untyped-call]
    address = f"127.0.0.1:{listeners.bind_session(server, authority, '127.0.0.1', 0)}"
    await server.start()
    try:
        yield House(far, authority, authority.credential(Role.NODE, "n", address, address, time.time()), folder)
    finally:
        await server.stop(0)


def run(tmp_path: Path, body: Callable[[House, Node], Awaitable[None]], start: bool = True) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), house(tmp_path) as made:
            node = made.node()
            if start:
                node.running = asyncio.create_task(node.session.run())
            try:
                await body(made, node)
            finally:
                if node.running is not None:
                    node.running.cancel()
                    await asyncio.wait({node.running})
                node.spool.close()

    asyncio.run(main())


def test_what_waited_goes_first_and_what_comes_meanwhile_after_it(tmp_path: Path) -> None:
    """1 three messages wait in the spool 2 the stream opens 3 more are added while those are being written 4 all arrive
    once, in the order of their numbers."""

    async def body(made: House, node: Node) -> None:
        for number in range(3):
            node.line(f"before {number}")
        node.running = asyncio.create_task(node.session.run())
        stream = await made.far.next()
        for number in range(50):
            node.line(f"meanwhile {number}")
        assert [(await stream.hear()).seq for _ in range(53)] == list(range(1, 54))
        node.line("after")
        assert (await stream.hear()).logs.lines == ["after"]

    run(tmp_path, body, start=False)


def test_after_an_outage_only_what_was_not_accepted_is_sent_again(tmp_path: Path) -> None:
    async def body(made: House, node: Node) -> None:
        stream = await made.far.next()
        for number in range(4):
            node.line(str(number))
        assert [(await stream.hear()).seq for _ in range(4)] == [1, 2, 3, 4]
        await stream.acknowledge(1)
        made.far.acknowledged = 2  # 2 was made durable, its acknowledgement got lost
        stream.end()
        again = await made.far.next()
        node.line("new")
        assert [(await again.hear()).seq for _ in range(3)] == [3, 4, 5]
        assert node.delivered == [1, 2]
        await again.acknowledge(5)
        await again.say(task_cancel=work_pb2.TaskCancel(call_id=1))
        while "task_cancel" not in node.handled:
            await again.hear("heartbeat")
        assert node.delivered == [1, 2, 3, 4, 5] and not node.spool.waiting()
        assert len(set(map(id, node.connections))) == 2

    run(tmp_path, body)


def test_a_refused_message_ends_the_stream_and_comes_again(tmp_path: Path) -> None:
    async def body(made: House, node: Node) -> None:
        stream = await made.far.next()
        node.line("one")
        assert (await stream.hear()).seq == 1
        stream.end(Exhausted("the disk is full"))
        again = await made.far.next()
        assert (await again.hear()).seq == 1 and node.session.problem == ""

    run(tmp_path, body)


def test_a_heartbeat_out_of_turn_is_stamped_like_the_others(tmp_path: Path) -> None:
    """What comes back of one is the way to the coordinator: without a stamp it would seem to be hours long."""

    async def body(made: House, node: Node) -> None:
        stream = await made.far.next()
        node.session.send_heartbeat()
        heard = [await stream.hear("heartbeat") for _ in range(4)]
        assert [beat.number - heard[0].number for beat in heard] == [0, 1, 2, 3]
        assert 0 < heard[0].sent_s <= heard[1].sent_s <= heard[2].sent_s <= heard[3].sent_s

    run(tmp_path, body)


def test_a_long_backlog_does_not_hold_up_heartbeats(tmp_path: Path) -> None:
    async def body(made: House, node: Node) -> None:
        for number in range(2000):
            node.line(f"{number:05} " + "x" * 2000)
        node.running = asyncio.create_task(node.session.run())
        stream = await made.far.next()
        kinds: list[str] = []
        async for kind in stream.everything():
            kinds.append(kind)
            if kinds.count("durable") == 2000:
                break
        assert "heartbeat" in kinds[1:1000]

    run(tmp_path, body, start=False)


def test_dropping_what_may_be_dropped_never_touches_a_numbered_message(tmp_path: Path) -> None:
    async def body(made: House, node: Node) -> None:
        assert not node.session.send(pb.NodeMessage(capacity_json=b"nobody is there"))
        stream = await made.far.next()
        sent = [node.session.send(pb.NodeMessage(capacity_json=b"{}")) for _ in range(11_000)]
        assert sent.index(False) >= 9_000  # without the event loop in between nothing was written
        node.line("one")
        assert (await stream.hear()).seq == 1
        with pytest.raises(SpecError, match="over the limit"):
            node.session.send_durable(pb.Durable(progress_json=b"x" * 5_000_000))
        node.line("two")
        assert (await stream.hear()).seq == 2

    run(tmp_path, body)


def test_the_last_word_arrives_before_the_stream_ends(tmp_path: Path) -> None:
    async def body(made: House, node: Node) -> None:
        stream = await made.far.next()
        node.line("one")
        finishing = asyncio.create_task(node.session.finish(pb.NodeMessage(leaving=pb.Leaving(reason="done"))))
        kinds = [kind async for kind in stream.everything()]
        assert {"durable", "leaving"} <= set(kinds) and not finishing.done()
        stream.end()
        await finishing
        assert node.running is not None
        await node.running  # it does not connect again
        assert not node.session.is_connected
        await node.session.finish(pb.NodeMessage())

    run(tmp_path, body)


def test_a_coordinator_that_says_nothing_is_taken_for_gone(tmp_path: Path) -> None:
    async def body(made: House, node: Node) -> None:
        made.far.lease_ttl_s = 0.1
        first = await made.far.next()
        second = await made.far.next()
        assert second is not first
        while not node.session.is_connected:
            await made.far.next()
        first.ends.cancel()

    run(tmp_path, body)


@pytest.mark.parametrize("error", [AccessError("removed"), Unreachable("older", code=None)])
def test_only_a_refusal_ends_the_session(tmp_path: Path, error: HiveError) -> None:
    async def body(made: House, node: Node) -> None:
        made.far.refuse = error
        await made.far.hellos.get()
        if isinstance(error, AccessError):
            assert node.running is not None
            with pytest.raises(AccessError, match="removed"):
                await node.running
        else:
            await made.far.hellos.get()
            made.far.refuse = None
            await made.far.next()

    run(tmp_path, body)


def test_trouble_on_this_machine_is_waited_out(tmp_path: Path) -> None:
    async def body(made: House, node: Node) -> None:
        made.credentials += [OSError(28, "No space left on device"), Conflict("busy"), RuntimeError("a bug")]
        node.running = asyncio.create_task(node.session.run())
        await made.far.next()

    run(tmp_path, body, start=False)


def test_another_coordinator_on_the_old_port_refuses_nobody(tmp_path: Path) -> None:
    """The coordinator moved, a stranger listens where it was: the node goes on asking where it is."""

    async def body(made: House, node: Node) -> None:
        async with house(tmp_path / "stranger") as stranger:
            moved = made.credential.at(stranger.credential.front_address, stranger.credential.session_address)
            made.credentials += [moved, moved]
            node.running = asyncio.create_task(node.session.run())
            await made.far.next()
            assert not made.credentials

    run(tmp_path, body, start=False)


def test_a_renewed_credential_is_used_for_the_next_stream(tmp_path: Path) -> None:
    async def body(made: House, node: Node) -> None:
        address = made.credential.session_address
        first = await made.far.next()
        made.credential = made.authority.credential(Role.NODE, "renamed", address, address, time.time())
        first.end()
        second = await made.far.next()
        assert first.caller != second.caller == made.credential.id

    run(tmp_path, body)


def test_a_stream_that_breaks_while_the_session_is_cancelled_still_ends_it(tmp_path: Path) -> None:
    """1 something on the stream fails 2 in the same moment the daemon ends and cancels the session 3 the error must not
    hide the cancellation: nobody would ever cancel again."""

    async def body(made: House, node: Node) -> None:
        def trouble() -> None:
            assert node.running is not None
            node.running.cancel()
            raise Exhausted("full")

        node.on_message = trouble
        stream = await made.far.next()
        await stream.say(task_cancel=work_pb2.TaskCancel(call_id=1))
        assert node.running is not None
        await asyncio.wait({node.running})
        assert node.running.cancelled()

    run(tmp_path, body)
