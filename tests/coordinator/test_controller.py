"""The shell around the control loop: durable first, whole or not at all, and nobody's cancellation tears it."""

from __future__ import annotations

import asyncio
import json

import pytest
from controller_bench import Coordinator

from coordinator.control import events as e
from coordinator.store.protocol import Accept, Duplicate
from protos.artifact import Manifest
from protos.errors import Exhausted, NotFound
from protos.ids import Fence, JobId, NodeId
from protos.states import AttemptState, JobState, NodeLink
from protos.work import Checkpoint, Outcome, StepTimes

JOB = JobId("j-1")


def test_every_state_a_job_passed_through_is_written_down_in_order() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.running()
        for rank in (1, 0):
            outcome = Outcome(AttemptState.DONE, 10, 320)
            await made.report(rank, AttemptState.DONE, outcome=outcome)
        await made.check()
        payloads = [json.loads(event.payload_json) for event in await made.store.events(job_id=JOB, kinds=["job"])]
        states = [payload["state"] for payload in payloads]
        assert list(dict.fromkeys(states)) == [
            "SUBMITTED",
            "PLANNING",
            "QUEUED",
            "STARTING",
            "RUNNING",
            "SUCCEEDED",
        ]
        record = await made.store.job(JOB)
        assert record is not None
        assert (record.exit_code, record.step, record.samples) == (0, 10, 320)
        assert record.started_s is not None
        assert record.finished_s is not None

    asyncio.run(run())


def test_a_failed_commit_changes_nothing_and_the_same_word_counts_when_it_comes_again() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.connect("a", "b")
        await made.submit()
        before, done = made.controller.state, len(made.effects)
        made.store.broken = Exhausted("the disk is full", "free some space")
        with pytest.raises(Exhausted):
            await made.report(0, AttemptState.FAILED, Accept(NodeId("a"), "s-1", 1))
        assert made.controller.state is before
        assert len(made.effects) == done
        made.store.broken = None
        await made.report(0, AttemptState.FAILED, Accept(NodeId("a"), "s-1", 1))
        assert made.job().state is JobState.RECOVERING
        await made.check()

    asyncio.run(run())


def test_a_submission_that_could_not_be_written_leaves_no_trace() -> None:
    async def run() -> None:
        made = Coordinator()
        made.store.broken = Exhausted("the disk is full", "free some space")
        with pytest.raises(Exhausted):
            await made.submit()
        assert made.controller.state.jobs == {}
        with pytest.raises(NotFound):
            made.controller.record(JOB)
        made.store.broken = None
        await made.submit()
        assert made.job().state is JobState.QUEUED

    asyncio.run(run())


def test_a_message_that_was_accepted_before_changes_nothing() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.connect("a", "b")
        await made.submit()
        await made.report(0, AttemptState.ACCEPTED, Accept(NodeId("a"), "s-1", 1))
        before = made.controller.state
        with pytest.raises(Duplicate):
            await made.report(0, AttemptState.FAILED, Accept(NodeId("a"), "s-1", 1))
        assert made.controller.state is before
        await made.check()

    asyncio.run(run())


def test_a_stream_that_breaks_while_its_report_is_written_does_not_part_memory_from_store() -> None:
    """1 the report's commit is under way 2 the stream breaks, its reader is cancelled 3 the database commits
    4 without care the controller would go on with the old version and every later write of the job would be refused."""

    async def run() -> None:
        made = Coordinator()
        await made.connect("a", "b")
        await made.submit()
        made.store.gate = asyncio.Event()
        reader = asyncio.create_task(made.report(0, AttemptState.ACCEPTED, Accept(NodeId("a"), "s-1", 1)))
        await made.store.waiting.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        made.store.gate.set()
        made.store.gate = None
        await made.tick()  # waits for its turn behind the report
        assert made.job().attempts[0].state is AttemptState.ACCEPTED
        await made.report(1, AttemptState.ACCEPTED)
        await made.check()

    asyncio.run(run())


def test_a_client_that_goes_while_its_job_is_written_leaves_a_job_that_runs() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.connect("a", "b")
        made.store.gate = asyncio.Event()
        client = asyncio.create_task(made.submit())
        await made.store.waiting.wait()
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client
        made.store.gate.set()
        made.store.gate = None
        await made.controller.post(e.Identified(JOB))
        assert made.job().state is JobState.STARTING
        await made.check()

    asyncio.run(run())


def test_an_effect_that_fails_does_not_keep_back_the_others() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.running()
        made.fail_on = e.Stop
        await made.controller.post(e.UserAsked(JOB, "cancel"))
        assert made.job().state is JobState.STOPPING
        for rank in (0, 1):
            await made.report(rank, AttemptState.FAILED)
        assert made.effects[-1] == e.Finish(JOB)

    asyncio.run(run())


def test_only_the_newest_checkpoint_of_an_unfinished_job_is_kept() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.running()
        for number, step in enumerate([5, 3, 9], start=1):
            accept = Accept(NodeId("a"), "s-1", number)
            await made.controller.checkpointed(JOB, Fence(1), Checkpoint(step, step, Manifest(())), accept)
        record = made.controller.record(JOB)
        assert json.loads(record.checkpoint_json or b"")["newest"]["step"] == 9
        await made.check()
        for rank in (1, 0):
            await made.report(rank, AttemptState.DONE, outcome=Outcome(AttemptState.DONE, 10, 320))
        ended = await made.store.job(JOB)
        await made.controller.checkpointed(
            JOB, Fence(1), Checkpoint(10, 10, Manifest(())), Accept(NodeId("a"), "s-1", 4)
        )
        assert await made.store.job(JOB) == ended
        assert await made.store.accepted(NodeId("a"), "s-1") == 4

    asyncio.run(run())


def test_what_was_found_of_a_job_that_was_cancelled_meanwhile_does_not_touch_its_end() -> None:
    async def run() -> None:
        made = Coordinator(size=9)
        await made.submit()
        await made.controller.post(e.UserAsked(JOB, "cancel"))
        ended = await made.store.job(JOB)
        made.now_s += 5.0
        await made.controller.post(e.Identified(JOB), change=lambda record: record)
        assert await made.store.job(JOB) == ended
        made.controller.forget(JOB)
        await made.controller.post(e.Identified(JOB), change=lambda record: record)
        assert await made.store.job(JOB) == ended

    asyncio.run(run())


def test_signs_of_life_count_at_the_next_tick() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.connect("a", "b")
        for _ in range(9):
            await made.tick(heard=("a",))
        links = {node: status.link for node, status in made.controller.state.nodes.items()}
        assert links == {"a": NodeLink.CONNECTED, "b": NodeLink.LOST}
        member = await made.store.member(NodeId("b"))
        assert member is not None
        assert member.link is NodeLink.LOST

    asyncio.run(run())


def test_an_ended_job_is_forgotten_and_an_unfinished_one_is_not() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.submit()
        made.controller.forget(JOB)
        assert JOB in made.controller.state.jobs
        await made.controller.post(e.UserAsked(JOB, "cancel"))
        made.controller.forget(JOB)
        assert JOB not in made.controller.state.jobs
        assert await made.store.job(JOB) is not None

    asyncio.run(run())


@pytest.mark.parametrize(("action", "state"), [("pause", JobState.PAUSED), (None, JobState.RECOVERING)])
def test_what_ranks_say_of_their_steps_is_told_only_while_they_run(action: str | None, state: JobState) -> None:
    async def run() -> None:
        made = Coordinator()
        await made.running()
        times = StepTimes(0.2, 0.1, 0.2, 0.0)
        for rank in (0, 1):
            made.controller.note_step_times(JOB, Fence(1), rank, times)
        said = [(each.rank, each.node_id, times) for each in made.job().attempts]
        assert len(said) == 2
        assert made.controller.times_now(JOB) == said
        if action is not None:
            await made.controller.post(e.UserAsked(JOB, action))
            await made.report(1, AttemptState.FAILED)
        await made.report(0, AttemptState.FAILED)
        assert (made.job().state, made.job().fence) == (state, Fence(1))
        assert made.controller.times_now(JOB) == []
        assert made.controller.times_now(JobId("j-2")) == []

    asyncio.run(run())


def test_the_clock_goes_on_after_a_tick_that_failed() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.connect("a", "b")
        made.now_s += 60.0
        made.store.broken = Exhausted("the disk is full", "free some space")
        ticking = asyncio.create_task(made.controller.run_clock(0.001))
        async with asyncio.timeout(10.0):
            await made.store.failed.wait()
            seen = made.store.last_seq
            made.store.broken = None
            assert await made.store.events_after(seen, 10.0, kinds=["node"])
        ticking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ticking

    asyncio.run(run())
