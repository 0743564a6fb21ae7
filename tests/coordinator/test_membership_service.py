"""The session stream over real TLS on loopback: what is acknowledged, what is refused, and what ends a stream."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from controller_bench import CAPACITY, Coordinator

from coordinator import listeners
from coordinator.authority import Authority, open_authority
from coordinator.control import events as e
from coordinator.job_folder import JobFolders
from coordinator.membership import MembershipService
from coordinator.rendezvous import Rendezvous
from coordinator.sessions import Sessions
from coordinator.store.protocol import PutMember
from coordinator.token_book import TokenBook
from protos import dial, documents
from protos.artifact import FileEntry, Manifest
from protos.credentials import Credential
from protos.errors import DeadlineExceeded, ErrorCode, Exhausted, HiveError, Unreachable
from protos.gen import membership_pb2 as pb
from protos.gen import membership_pb2_grpc, work_pb2
from protos.ids import Digest, JobId, NodeId
from protos.jobspec import DataSpec, JobSpec, ModelSpec
from protos.states import AttemptState, NodeLink
from protos.token import Role
from protos.work import Checkpoint, Fence, Metrics, Outcome, Progress, StepTimes, Task, TaskKind

JOB = JobId("j-1")
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


@dataclass
class House:
    """A session port over the real control loop; its store can be told to fail."""

    made: Coordinator
    authority: Authority
    sessions: Sessions
    folders: JobFolders
    address: str = ""
    replaced: list[tuple[JobId, Manifest]] = field(default_factory=list)

    async def member(self, name: str) -> Credential:
        credential = self.authority.credential(Role.NODE, name, self.address, self.address, time.time())
        await self.made.controller.describe_node(NodeId(credential.id), name, CAPACITY)
        return credential

    async def accepted(self, node: Node) -> int:
        return await self.made.store.accepted(NodeId(node.credential.id), node.spool_id)

    def link(self, node: Node) -> NodeLink:
        return self.made.controller.state.nodes[NodeId(node.credential.id)].link


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[House]:
    made = Coordinator(size=1)
    authority = open_authority(folder)
    running = House(made, authority, Sessions(), JobFolders(folder / "jobs"))
    server = listeners.session_server(TokenBook(made.store.real).is_member)
    rendezvous = Rendezvous(made.controller.is_current)
    service = MembershipService(
        authority,
        made.controller,
        running.sessions,
        rendezvous,
        made.store,  # type: ignore[arg-type]
        running.folders,
        lambda job_id, manifest: running.replaced.append((job_id, manifest)),
    )
    membership_pb2_grpc.add_MembershipServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    running.address = f"127.0.0.1:{listeners.bind_session(server, authority, '127.0.0.1', 0)}"
    await server.start()
    try:
        yield running
    finally:
        await server.stop(0)


def run(tmp_path: Path, body: Callable[[House], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), house(tmp_path) as running:
            await body(running)

    asyncio.run(main())


class Node:
    """The far side: a stream and nothing else."""

    def __init__(self, credential: Credential, address: str, spool_id: str = "s-1") -> None:
        self.credential = credential
        self.spool_id = spool_id
        self._channel = dial.channel(address, credential)
        stub: Any = membership_pb2_grpc.MembershipStub(self._channel)  # type: ignore[no-untyped-call]
        self.stream = stub.Attach()

    async def say(self, **body: Any) -> None:
        await self.stream.write(pb.NodeMessage(**body))

    async def hear(self, kind: str = "") -> pb.CoordinatorMessage:
        """The next message (of a kind)."""
        while True:
            with dial.errors_of("test"):
                message = await self.stream.read()
            assert message is not EOF, "the stream ended"
            if not kind or message.WhichOneof("body") == kind:
                heard: pb.CoordinatorMessage = message
                return heard

    async def ending(self) -> HiveError | None:
        """How the stream ended."""
        try:
            with dial.errors_of("test"):
                while await self.stream.read() is not EOF:
                    pass
        except HiveError as error:
            return error
        return None

    async def hello(self, **changes: Any) -> pb.Welcome:
        hello = pb.Hello(
            protocol=1,
            minimum_protocol=1,
            name=self.credential.name,
            capacity_json=documents.encode(CAPACITY),
            spool_id=self.spool_id,
        )
        hello.MergeFrom(pb.Hello(**changes))
        await self.say(hello=hello)
        return (await self.hear()).welcome

    async def close(self) -> None:
        self.stream.cancel()
        await self._channel.close(grace=None)


def durable(seq: int, fence: int = 1, rank: int = 0, **body: Any) -> pb.Durable:
    return pb.Durable(seq=seq, job_id=JOB, fence=fence, rank=rank, **body)


def report(seq: int, state: AttemptState, outcome: Outcome | None = None, fence: int = 1) -> pb.Durable:
    message = durable(seq, fence)
    message.report.state = state.value
    if outcome is not None:
        message.report.outcome_json = documents.encode(outcome)
    return message


async def attached(running: House, name: str = "n0") -> Node:
    node = Node(await running.member(name), running.address)
    await node.hello()
    await node.say(heartbeat=pb.Heartbeat(number=1))
    await node.hear("echo")  # nothing is read before the node is recorded as connected
    return node


async def working(running: House) -> Node:
    """A node with rank 0 of the job's first group, running."""
    node = await attached(running)
    await running.made.submit()
    await node.say(durable=report(1, AttemptState.RUNNING))
    assert (await node.hear("acknowledged")).acknowledged.seq == 1
    return node


def test_a_message_the_disk_does_not_take_is_never_passed_over(tmp_path: Path) -> None:
    """1 the disk is full when message 2 comes 2 it has space again when 3 comes 3 acknowledging 3 would give up 2, so
    the stream ends 4 the node connects again, is told 1, and sends 2 and 3."""

    async def body(running: House) -> None:
        node = await working(running)
        running.made.store.broken = Exhausted("the disk is full", "free some space")
        await node.say(durable=report(2, AttemptState.DONE, Outcome(AttemptState.DONE, 10, 320)))
        await running.made.store.failed.wait()
        running.made.store.broken = None
        await node.say(durable=durable(3, logs=work_pb2.LogLines(lines=["late"])))
        error = await node.ending()
        assert error is not None and error.code is ErrorCode.EXHAUSTED
        assert await running.accepted(node) == 1
        again = Node(node.credential, running.address)
        held = b'[{"job_id":"j-1","fence":1,"rank":0,"state":"RUNNING","step":10}]'
        assert (await again.hello(leases_json=held)).acknowledged_seq == 1
        await again.say(durable=report(2, AttemptState.DONE, Outcome(AttemptState.DONE, 10, 320)))
        assert (await again.hear("acknowledged")).acknowledged.seq == 2
        record = await running.made.store.job(JOB)
        assert record is not None and record.step == 10 and record.state.value == "SUCCEEDED"
        await again.close()
        await node.close()

    run(tmp_path, body)


def test_output_that_the_disk_does_not_take_comes_again_too(tmp_path: Path) -> None:
    async def body(running: House) -> None:
        node = await working(running)
        folder = running.folders.folder(JOB)
        (folder / "rank-0.log").mkdir()  # whatever the system says: it cannot be written
        await node.say(durable=durable(2, logs=work_pb2.LogLines(lines=["a line"])))
        assert await node.ending() is not None
        assert await running.accepted(node) == 1
        await node.close()

    run(tmp_path, body)


def test_a_report_that_cannot_be_read_ends_its_attempt_and_what_follows_still_counts(tmp_path: Path) -> None:
    async def body(running: House) -> None:
        node = await working(running)
        unreadable = durable(2)
        unreadable.report.state = "DONE"
        unreadable.report.outcome_json = b'{"state": "DISSOLVED"}'
        await node.say(durable=unreadable)
        assert (await node.hear("acknowledged")).acknowledged.seq == 2
        record = await running.made.store.job(JOB)
        assert record is not None and record.state.value == "FAILED" and "cannot be read" in record.message
        unknown = durable(3)
        unknown.report.state = "EVAPORATED"
        for seq, message in ((3, unknown), (4, durable(4)), (5, durable(5, progress_json=b"{"))):
            await node.say(durable=message)
            assert (await node.hear("acknowledged")).acknowledged.seq == seq
        await node.close()

    run(tmp_path, body)


def test_the_same_message_again_is_acknowledged_and_changes_nothing(tmp_path: Path) -> None:
    async def body(running: House) -> None:
        node = await working(running)
        line = durable(2, logs=work_pb2.LogLines(lines=["once"]))
        for _ in range(2):
            await node.say(durable=line)
            assert (await node.hear("acknowledged")).acknowledged.seq == 2
        assert running.folders.log_path(JOB, 0).read_text() == "once\n"
        await node.close()

    run(tmp_path, body)


def test_a_node_speaks_only_for_its_own_ranks(tmp_path: Path) -> None:
    async def body(running: House) -> None:
        node = await working(running)
        stranger = await attached(running, "stranger")
        forged = Checkpoint(99, 99, Manifest((FileEntry("model.safetensors", Digest("a" * 64), 1),)))
        times = StepTimes(0.5, 0.1, 0.4, 0.0)
        metrics = Progress((Metrics(1.0, 9, 0, "train", 0.5, 9),), 9, None, 0, None, "train", 9, times)
        messages = [
            durable(1, checkpoint_json=documents.encode(forged)),
            durable(2, progress_json=documents.encode(metrics)),
            durable(3, logs=work_pb2.LogLines(lines=["I was here"])),
            report(4, AttemptState.FAILED, Outcome(AttemptState.FAILED)),
        ]
        for message in messages:
            await stranger.say(durable=message)
            assert (await stranger.hear("acknowledged")).acknowledged.seq == message.seq
        call = work_pb2.StoreCall(call_id=1, job_id=JOB, fence=1, operation="set", keys=["k"], value=b"v")
        await stranger.say(store_call=call)
        assert (await stranger.hear("store_reply")).store_reply.status == "refused"
        job = running.made.job()
        assert (job.step, job.attempts[0].state) == (0, AttemptState.RUNNING)
        assert running.made.controller.record(JOB).checkpoint_json is None
        assert not running.folders.log_path(JOB, 0).exists()
        assert running.made.controller.step_times(JOB, Fence(1)) == {}
        await node.say(durable=durable(2, progress_json=documents.encode(metrics)))
        await node.hear("acknowledged")
        assert running.made.controller.step_times(JOB, Fence(1)) == {0: times}
        assert running.made.controller.step_times(JOB, Fence(2)) == {}, "another group takes other times"
        await stranger.close()
        await node.close()

    run(tmp_path, body)


def test_a_checkpoint_that_is_replaced_is_told_to_the_collector(tmp_path: Path) -> None:
    async def body(running: House) -> None:
        node = await working(running)
        first, second = (Manifest((FileEntry("model.safetensors", Digest(d * 64), 1),)) for d in "ab")
        for seq, (step, manifest) in enumerate(((10, first), (20, second), (15, first)), start=2):
            await node.say(durable=durable(seq, checkpoint_json=documents.encode(Checkpoint(step, step, manifest))))
            assert (await node.hear("acknowledged")).acknowledged.seq == seq
        unsafe = Manifest((FileEntry("../../etc/passwd", Digest("c" * 64), 1),))
        await node.say(durable=durable(5, checkpoint_json=documents.encode(Checkpoint(30, 30, unsafe))))
        assert (await node.hear("acknowledged")).acknowledged.seq == 5
        assert running.replaced == [(JOB, first)]
        await node.close()

    run(tmp_path, body)


def test_a_newer_stream_of_a_node_takes_the_place_of_the_older(tmp_path: Path) -> None:
    async def body(running: House) -> None:
        first = await attached(running)
        second = Node(first.credential, running.address)
        await second.hello()
        assert await first.ending() is None
        assert running.link(first) is NodeLink.CONNECTED and len(running.sessions) == 1
        await second.say(heartbeat=pb.Heartbeat(number=7, sent_s=1.5))
        assert (await second.hear("echo")).echo.number == 7
        await first.close()
        await second.close()

    run(tmp_path, body)


def test_the_last_word_is_read_before_the_stream_closes(tmp_path: Path) -> None:
    async def body(running: House) -> None:
        node = await attached(running)
        await node.say(leaving=pb.Leaving(reason="stopped by its owner"))
        await node.stream.done_writing()
        assert await node.ending() is None
        assert running.link(node) is NodeLink.LEFT and not running.sessions
        await node.close()

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ({"heartbeat": pb.Heartbeat()}, ErrorCode.INVALID_SPEC),
        ({"hello": pb.Hello(protocol=1, minimum_protocol=1, capacity_json=b"[]")}, ErrorCode.INVALID_SPEC),
        ({"hello": pb.Hello(protocol=0, minimum_protocol=0)}, ErrorCode.VERSION_MISMATCH),
        (
            {
                "hello": pb.Hello(
                    protocol=1, minimum_protocol=1, capacity_json=documents.encode(CAPACITY), activity="SLEEPWALKING"
                )
            },
            ErrorCode.INVALID_SPEC,
        ),
    ],
)
def test_a_stream_that_does_not_begin_as_agreed_is_refused_in_words(
    tmp_path: Path, first: dict[str, Any], code: ErrorCode
) -> None:
    async def body(running: House) -> None:
        node = Node(await running.member("n0"), running.address)
        await node.say(**first)
        error = await node.ending()
        assert error is not None and error.code is code and error.message
        assert not running.sessions
        await node.close()

    run(tmp_path, body)


def test_a_stream_that_could_not_be_recorded_leaves_no_session_behind(tmp_path: Path) -> None:
    async def body(running: House) -> None:
        node = Node(await running.member("n0"), running.address)
        running.made.store.broken = Exhausted("the disk is full", "free some space")
        with contextlib.suppress(Exhausted):
            await node.hello()
        error = await node.ending()
        assert error is not None and error.code is ErrorCode.EXHAUSTED
        assert not running.sessions
        await node.close()

    run(tmp_path, body)


def test_nonsense_in_the_middle_ends_the_stream_with_its_reason(tmp_path: Path) -> None:
    async def body(running: House) -> None:
        for nonsense in ({"capacity_json": b"{"}, {"heartbeat": pb.Heartbeat(activity="DREAMING")}):
            node = await attached(running)
            await node.say(**nonsense)
            error = await node.ending()
            assert error is not None and error.code is ErrorCode.INVALID_SPEC
            await node.close()

    run(tmp_path, body)


def test_a_rendezvous_call_that_never_ends_is_bounded_whatever_its_deadline(tmp_path: Path) -> None:
    async def body(running: House) -> None:
        node = await working(running)
        for number, deadline_s in enumerate((float("nan"), -1.0, 0.0)):
            call = work_pb2.StoreCall(
                call_id=number, job_id=JOB, fence=1, operation="get", keys=["never"], deadline_s=deadline_s
            )
            await node.say(store_call=call)
            reply = (await node.hear("store_reply")).store_reply
            assert (reply.call_id, reply.status) == (number, "timeout")
        await node.close()

    run(tmp_path, body)


def test_an_answer_that_cannot_be_read_is_an_error_of_the_question_alone(tmp_path: Path) -> None:
    async def body(running: House) -> None:
        node = await attached(running)
        spec = JobSpec(name="t", model=ModelSpec(source="m.py:build"), data=DataSpec(source="builtin:digits"))
        task = Task(TaskKind.IDENTIFY, JOB, Fence(0), 0, 1, "single_node", spec, (1,))
        node_id = NodeId(node.credential.id)
        asked = asyncio.create_task(running.sessions.run_task(node_id, task, 30.0))
        number = (await node.hear("task_request")).task_request.call_id
        await node.say(task_result=work_pb2.TaskResult(call_id=number, outcome_json=b"?"))
        with pytest.raises(HiveError, match="Outcome"):
            await asked
        await node.say(heartbeat=pb.Heartbeat(number=1))
        assert (await node.hear("echo")).echo.number == 1
        with pytest.raises(DeadlineExceeded):
            await running.sessions.run_task(node_id, task, 0.01)
        waiting = asyncio.create_task(running.sessions.run_task(node_id, task, 30.0))
        await node.hear("task_request")
        await node.close()
        with pytest.raises(Unreachable, match="went away"):
            await waiting

    run(tmp_path, body)


def test_a_removed_node_that_brings_a_new_token_is_taken_again(tmp_path: Path) -> None:
    async def body(running: House) -> None:
        node = await attached(running)
        node_id = NodeId(node.credential.id)
        await running.made.controller.post(e.NodeControlled(node_id, "remove"))
        running.sessions[node_id].close()
        await node.ending()
        removed = await running.made.store.member(node_id)
        assert removed is not None and removed.left
        await running.made.store.commit(  # as coordinator.token_book does it
            PutMember(replace(removed, left=False, link=NodeLink.JOINING), removed.version)
        )
        again = Node(node.credential, running.address)
        await again.hello()
        await again.say(heartbeat=pb.Heartbeat(number=1))
        assert (await again.hear("echo")).echo.number == 1
        assert running.link(again) is NodeLink.CONNECTED
        await again.close()
        await node.close()

    run(tmp_path, body)
