"""A coordinator that is killed at any moment and started again: what it takes up, and that it can go on from there."""

from __future__ import annotations

import asyncio

import pytest
from control_bench import TIMING, stops
from controller_bench import Coordinator

from coordinator.control import events as e
from protos.errors import Blame
from protos.ids import Fence, JobId, NodeId
from protos.states import AttemptState, JobState, NodeLink, Reason, StopMode
from protos.work import Fault, Outcome

JOB = JobId("j-1")
HELD = Outcome(
    AttemptState.FAILED, 5, 160, fault=Fault(Reason.PEER_LOST, Blame.NETWORK, "held", retryable=True), held_step=5
)


async def finishes(made: Coordinator) -> None:
    """From here the job can be brought to its result."""
    for _ in range(40):
        job = made.job()
        if job.state is JobState.SUCCEEDED:
            break
        for attempt in job.working:
            outcome = HELD if job.state is JobState.RECOVERING else Outcome(AttemptState.DONE, 10, 320)
            await made.report(attempt.rank, outcome.state, outcome=outcome)
        if made.job().ended:
            break
        await made.tick(heard=("a", "b"))
    assert made.job().state is JobState.SUCCEEDED
    await made.check()


def test_a_job_in_training_goes_on_when_its_nodes_present_their_leases() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.running()
        again = await made.restart()
        assert again.job().state is JobState.RUNNING
        assert all(node.link is NodeLink.DISCONNECTED for node in again.controller.state.nodes.values())
        await again.connect("a", leases=[("j-1", 1, 0)])
        await again.connect("b", leases=[("j-1", 1, 1)])
        assert again.effects == []
        await finishes(again)
        assert again.job().fence == 1

    asyncio.run(run())


def test_a_group_that_was_forming_is_held_and_formed_again() -> None:
    """The rendezvous was in the memory of the process that died."""

    async def run() -> None:
        made = Coordinator()
        await made.connect("a", "b")
        await made.submit()
        await made.report(0, AttemptState.ACCEPTED)
        again = await made.restart()
        assert (again.job().state, again.job().reason) == (JobState.RECOVERING, Reason.COORDINATOR_RESTARTED)
        await again.check()
        await again.connect("a", leases=[("j-1", 1, 0)])
        assert stops(again.effects) == [("a", 1, "hold")]
        await again.connect("b")  # its offer was lost: not offered again, this group is over
        assert not any(isinstance(effect, e.Offer) for effect in again.effects)
        await finishes(again)
        assert again.job().fence == 2
        assert again.job().retries == 0  # a restart is not the group's failure

    asyncio.run(run())


def test_a_job_survives_any_number_of_restarts_while_its_group_forms() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.connect("a", "b")
        await made.submit()
        for _ in range(6):
            made = await made.restart()
            await made.connect("a", "b")
            await made.tick(3.0, heard=("a", "b"))
            await made.tick(heard=("a", "b"))
            assert made.job().state is JobState.STARTING
        await finishes(made)

    asyncio.run(run())


@pytest.mark.parametrize("end_s", [30.0])
def test_nodes_that_do_not_come_back_are_lost_after_a_grace(end_s: float) -> None:
    async def run() -> None:
        made = Coordinator()
        await made.running()
        again = await made.restart()
        started_s = again.now_s
        while again.job().state is JobState.RUNNING:
            await again.tick()
            assert again.now_s - started_s < end_s
        assert again.now_s - started_s >= TIMING.reconnect_grace_s
        nodes = again.controller.state.nodes
        assert {node.link for node in nodes.values()} == {NodeLink.LOST}
        await again.check()
        await again.connect("a", "b")
        await finishes(again)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("action", "wanted", "ends"),
    [("cancel", StopMode.CANCEL, JobState.CANCELLED), ("pause", StopMode.PAUSE, JobState.PAUSED)],
)
def test_what_the_user_was_promised_is_kept_across_a_restart(action: str, wanted: StopMode, ends: JobState) -> None:
    async def run() -> None:
        made = Coordinator()
        await made.running()
        await made.controller.post(e.UserAsked(JOB, action))
        again = await made.restart()
        assert again.job().wanted is wanted
        await again.connect("a", leases=[("j-1", 1, 0)])
        assert stops(again.effects) == [("a", 1, wanted.value)]
        for _ in range(60):
            await again.tick(heard=("a",))
        assert again.job().state is ends
        await again.check()

    asyncio.run(run())


def test_a_pause_asked_while_the_group_formed_is_kept_across_a_restart() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.connect("a", "b")
        await made.submit()
        await made.controller.post(e.UserAsked(JOB, "pause"))
        for rank in (0, 1):
            await made.report(rank, AttemptState.READY)
        again = await made.restart()
        assert again.job().wanted is StopMode.PAUSE

    asyncio.run(run())


def test_a_paused_job_stays_paused_and_knows_who_holds_its_state() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.running()
        await made.controller.post(e.UserAsked(JOB, "pause"))
        for rank in (0, 1):
            await made.report(rank, AttemptState.FAILED, outcome=HELD)
        again = await made.restart()
        assert again.job().state is JobState.PAUSED
        assert {(held.node_id, held.step) for held in again.job().held} == {("a", 5), ("b", 5)}
        await again.connect("a", "b")
        await again.controller.post(e.UserAsked(JOB, "resume"))
        assert (again.job().state, again.job().fence) == (JobState.STARTING, 2)
        await again.check()

    asyncio.run(run())


def test_a_job_that_was_being_identified_is_identified_again() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.connect("a", "b")
        again_from = made
        await made.controller.submit(_record())
        again = await again_from.restart()
        assert again.effects == [e.Identify(JOB)]
        await again.controller.post(e.Identified(JOB))
        await again.connect("a", "b")
        await finishes(again)

    asyncio.run(run())


def _record():  # type: ignore[no-untyped-def]
    from coordinator.records import Job

    return Job(JOB, "job", "me", JobState.SUBMITTED, Reason.NONE, b"{}", 1000.0, 1000.0)


def test_a_job_that_ended_is_not_taken_up() -> None:
    async def run() -> None:
        made = Coordinator(size=9)
        await made.submit()
        await made.controller.post(e.UserAsked(JOB, "cancel"))
        again = await made.restart()
        assert again.controller.state.jobs == {}

    asyncio.run(run())


def test_jobs_keep_their_order_and_new_ones_come_after() -> None:
    async def run() -> None:
        made = Coordinator(size=9)
        for name in ("j-1", "j-2", "j-3"):
            await made.submit(name)
            made.now_s += 1.0
        again = await made.restart()
        await again.submit("j-0")
        ordered = sorted(again.controller.state.jobs.values(), key=lambda job: job.order)
        assert [job.job_id for job in ordered] == ["j-1", "j-2", "j-3", "j-0"]

    asyncio.run(run())


def test_a_removed_node_is_not_taken_up_and_a_drain_is() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.connect("a", "b")
        await made.controller.post(e.NodeControlled(NodeId("a"), "remove"))
        await made.controller.post(e.NodeControlled(NodeId("b"), "drain"))
        again = await made.restart()
        assert set(again.controller.state.nodes) == {"b"}
        await again.connect("b")
        assert not again.controller.state.nodes[NodeId("b")].willing

    asyncio.run(run())


def test_a_restart_in_the_middle_of_a_restart_is_no_worse() -> None:
    async def run() -> None:
        made = Coordinator()
        await made.connect("a", "b")
        await made.submit()
        again = await (await (await made.restart()).restart()).restart()
        assert again.job().fence == Fence(1)
        await again.connect("a", "b")
        await finishes(again)

    asyncio.run(run())
