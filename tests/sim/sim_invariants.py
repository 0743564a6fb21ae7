"""What must hold after every step of a simulation, whatever happened: checked on every write and between steps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from coordinator.records import Attempt, Job
from coordinator.store.protocol import Accept
from protos.ids import Fence, JobId, NodeId
from protos.states import (
    ATTEMPT_TRANSITIONS,
    JOB_TRANSITIONS,
    TERMINAL_JOB_STATES,
    AttemptState,
    JobState,
    NodeLink,
    Reason,
)

if TYPE_CHECKING:
    from sim_world import World


class Watch:
    def __init__(self, world: World) -> None:
        self._world = world
        self._jobs: dict[JobId, Job] = {}
        self._attempts: dict[tuple[JobId, Fence, int], AttemptState] = {}
        self._accepted: set[tuple[NodeId, str, int]] = set()
        self.transitions: set[tuple[JobState | None, JobState]] = set()

    def accepted(self, write: Accept) -> None:
        key = (write.node_id, write.spool_id, write.seq)
        assert key not in self._accepted, f"message {key} was accepted twice"
        self._accepted.add(key)

    def wrote_job(self, job: Job) -> None:
        before = self._jobs.get(job.job_id)
        self.transitions.add((before.state if before else None, job.state))
        if before is not None:
            what = f"{job.job_id} {before.state}->{job.state}"
            assert job.state is before.state or job.state in JOB_TRANSITIONS[before.state], what
            if before.state in TERMINAL_JOB_STATES:
                assert replace(job, version=before.version) == before, f"{what}: a job that had ended was changed"
            assert job.fence >= before.fence, f"{what}: the fence fell from {before.fence} to {job.fence}"
            assert job.step >= before.step, f"{what}: committed step fell from {before.step} to {job.step}"
        if job.state is JobState.SUCCEEDED:
            total = self._world.jobs[job.job_id].total
            assert (job.step, job.samples) == (total, total * self._world.batch), f"{job.job_id}: {job.step}/{total}"
        assert job.step <= self._world.progress.get(job.job_id, 0), f"{job.job_id}: step {job.step} was never taken"
        self._jobs[job.job_id] = job

    def wrote_attempt(self, attempt: Attempt) -> None:
        key = (attempt.job_id, attempt.fence, attempt.rank)
        before = self._attempts.get(key)
        assert before is None or attempt.state is before or attempt.state in ATTEMPT_TRANSITIONS[before], f"{key}"
        job = self._jobs[attempt.job_id]
        assert attempt.fence == job.fence, f"{key} was written under fence {job.fence}"
        self._attempts[key] = attempt.state

    async def between_steps(self) -> None:
        world, coordinator = self._world, self._world.coordinator
        if world.failures:
            raise world.failures[0]
        if coordinator is None:
            return
        state = coordinator.controller.state
        busy: dict[NodeId, JobId] = {}
        for job in state.jobs.values():
            if job.ended:
                continue
            record = await coordinator.store.job(job.job_id)
            mine = coordinator.controller.record(job.job_id)
            assert record == mine, f"{job.job_id}: the controller's record is not the stored one"
            assert record.state is job.state, f"{job.job_id} is {job.state}, written down is {record.state}"
            for attempt in job.working:
                other = busy.setdefault(attempt.node_id, job.job_id)
                assert other == job.job_id, f"{attempt.node_id} holds attempts of {other} and {job.job_id}"
                assert job.state in _WORKING, f"{job.job_id} is {job.state} with unfinished attempts"
        for node in world.nodes:
            alive = [worker for worker in node.workers.values() if worker.alive]
            assert len({worker.generation for worker in alive}) <= 1, f"{node.node_id} works for two groups"
            assert len({worker.task.rank for worker in alive}) == len(alive) <= node.ranks

    async def at_the_end(self) -> None:
        """Faults have stopped and the bound has passed: everything acknowledged has come to its end."""
        world = self._world
        coordinator = world.coordinator
        assert coordinator is not None
        for job_id, job in world.jobs.items():
            record = await coordinator.store.job(job_id)
            if not job.acknowledged:
                continue
            assert record is not None, f"{job_id} was acknowledged and is lost"
            told = f"{job_id} is {record.state} ({record.reason}: {record.message}), last asked {job.asked!r}"
            if job.asked == "cancel":
                assert record.state in TERMINAL_JOB_STATES, told
            elif job.asked:  # paused, or the coordinator died before it could answer the last request
                paused = record.state is JobState.PAUSED and record.reason is Reason.PAUSED_BY_USER
                assert paused or record.state in TERMINAL_JOB_STATES, told
            else:
                assert record.state in TERMINAL_JOB_STATES, told
            if record.state is JobState.CANCELLED:
                assert "cancel" in job.asked, told
            if record.state is JobState.FAILED:
                allowed = {Reason.RETRIES_EXHAUSTED}
                if job.fails_at is not None:
                    allowed.add(Reason.USER_CODE)
                if job.refused:
                    allowed.add(Reason.MODEL_UNUSABLE)
                if job.unplaceable:
                    allowed.add(Reason.NO_PLACEMENT)
                assert record.reason in allowed, told
            if record.state is JobState.SUCCEEDED:
                assert job.fails_at is None or job.fails_at > job.total, told
        for node in world.nodes:
            assert not node.spool.waiting(), f"{node.node_id} still waits for acknowledgements"
            assert not node.state.works or any(
                w.task.job_id in world.unfinished() for w in node.state.works.values()
            ), f"{node.node_id} remembers {list(node.state.works)}"
            session = coordinator.sessions.get(node.node_id)
            wire = coordinator.wires.get(id(session))
            if wire is not None and not wire.broken:  # else its next hello is still to come
                link = coordinator.controller.state.nodes[node.node_id].link
                assert link is not NodeLink.LEFT, f"{node.node_id} is here and taken for gone"
        check = await coordinator.store.verify_chain()
        assert check.broken_at is None, check.message


_WORKING = frozenset({JobState.STARTING, JobState.RUNNING, JobState.RECOVERING, JobState.STOPPING})
