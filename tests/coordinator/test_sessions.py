"""Connected nodes: what is queued, what is asked, and what becomes of both when a node goes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from coordinator.sessions import Session, Sessions
from protos import documents
from protos.artifact import Manifest
from protos.capacity import Capacity
from protos.errors import DeadlineExceeded, NotFound, Unreachable
from protos.gen import membership_pb2 as pb
from protos.gen import work_pb2
from protos.ids import Fence, JobId, NodeId
from protos.jobspec import DataSpec, JobSpec, ModelSpec
from protos.states import AttemptState
from protos.work import Outcome, Task, TaskKind

CAPACITY = Capacity("host", "machine", "linux", "3.11", 1.0, 1, 1, 1, 1)
SPEC = JobSpec(name="t", model=ModelSpec(source="m.py:build"), data=DataSpec(source="builtin:digits"))
TASK = Task(TaskKind.IDENTIFY, JobId("j-1"), Fence(0), 0, 1, "single_node", SPEC, (1,))
N = NodeId("n")


def run(body: Callable[[Sessions, Session], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            sessions, session = Sessions(), Session(N, "box", "s-1", CAPACITY)
            sessions.add(session)
            await body(sessions, session)

    asyncio.run(main())


def test_a_question_gets_its_own_answer() -> None:
    async def body(sessions: Sessions, session: Session) -> None:
        asked = [asyncio.create_task(sessions.run_task(N, TASK, 10.0)) for _ in range(2)]
        numbers = []
        for _ in asked:
            message = await session.outgoing.get()
            assert message is not None and documents.decode(Task, message.task_request.task_json) == TASK
            numbers.append(message.task_request.call_id)
        for number in reversed(numbers):
            outcome = replace(Outcome(AttemptState.DONE), document=str(number))
            result = work_pb2.TaskResult(call_id=number, outcome_json=documents.encode(outcome))
            sessions.answer_task(NodeId("another node"), result)
            sessions.answer_task(N, result)
            sessions.answer_task(N, result)  # the same again
        assert [(await task).document for task in asked] == [str(number) for number in numbers]
        assert session.tasks == {}

    run(body)


def test_a_node_that_goes_fails_its_questions_at_once() -> None:
    async def body(sessions: Sessions, session: Session) -> None:
        asked = asyncio.create_task(sessions.run_task(N, TASK, 1000.0))
        seen = asyncio.create_task(sessions.who_sees(N, Manifest(()), 1000.0))
        await session.outgoing.get()
        await session.outgoing.get()
        session.close()
        with pytest.raises(Unreachable, match="box went away"):
            await asked
        assert await seen == frozenset()
        with pytest.raises(Unreachable):  # closed, not removed yet: nobody would ever answer
            await sessions.run_task(N, TASK, 1000.0)
        assert await sessions.who_sees(N, Manifest(()), 1000.0) == frozenset()
        assert sessions.remove(session)
        with pytest.raises(NotFound):
            await sessions.run_task(N, TASK, 1000.0)

    run(body)


def test_a_node_that_does_not_answer_is_waited_for_so_long_and_no_longer() -> None:
    async def body(sessions: Sessions, session: Session) -> None:
        with pytest.raises(DeadlineExceeded, match="box did not finish identify"):
            await sessions.run_task(N, TASK, 0.01)
        asked, cancelled = session.outgoing.get_nowait(), session.outgoing.get_nowait()
        assert asked is not None and cancelled is not None
        assert cancelled.task_cancel.call_id == asked.task_request.call_id > 0
        assert await sessions.who_sees(N, Manifest(()), 0.01) == frozenset()
        assert session.tasks == {} and session.files == {}

    run(body)


def test_a_newer_stream_takes_the_place_and_the_older_does_not_take_it_along() -> None:
    async def body(sessions: Sessions, session: Session) -> None:
        newer = Session(N, "box", "s-1", CAPACITY)
        sessions.add(newer)
        assert session.closed and await session.outgoing.get() is None
        assert not sessions.remove(session) and sessions[N] is newer
        assert sessions.remove(newer) and not sessions

    run(body)


def test_a_node_that_does_not_read_is_cut_off_and_costs_no_more() -> None:
    async def body(sessions: Sessions, session: Session) -> None:
        for _ in range(10_001):
            assert sessions.send(N, pb.CoordinatorMessage(echo=pb.HeartbeatEcho()))
        assert session.closed and session.outgoing.qsize() == 1
        sessions.send(N, pb.CoordinatorMessage(echo=pb.HeartbeatEcho()))
        assert await session.outgoing.get() is None and session.outgoing.empty()
        assert not sessions.send(NodeId("nobody"), pb.CoordinatorMessage())

    run(body)
