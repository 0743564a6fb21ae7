"""The real Controller over a real store, with a clock that is told the time and effects that are only noted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from control_bench import TIMING, plan_on

from coordinator.control import events as e
from coordinator.control.state import JobView
from coordinator.controller import Controller
from coordinator.records import Attempt, Job
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import Write
from protos.capacity import Capacity
from protos.ids import Fence, JobId, NodeId
from protos.plan import Plan
from protos.states import Activity, AttemptState, JobState, Reason
from protos.work import HeldLease, Outcome

CAPACITY = Capacity("host", "machine", "linux", "3.11", 1.0, 1, 1, 1, 1)


class SlowStore:
    """A store whose commits wait for `gate` when there is one, and fail with `broken` when that is set."""

    def __init__(self, store: MemoryStore) -> None:
        self.real = store
        self.gate: asyncio.Event | None = None
        self.broken: Exception | None = None
        self.waiting = asyncio.Event()
        self.failed = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    async def commit(self, *writes: Write) -> Any:
        if self.broken is not None:
            self.failed.set()
            raise self.broken
        if self.gate is None:
            return await self.real.commit(*writes)
        # As the database does it: the writer's thread commits whether or not somebody still waits for the answer.
        work = asyncio.ensure_future(self._later(self.gate, writes))
        self.waiting.set()
        return await asyncio.shield(work)

    async def _later(self, gate: asyncio.Event, writes: Sequence[Write]) -> Any:
        await gate.wait()
        return await self.real.commit(*writes)


class Coordinator:
    def __init__(self, store: MemoryStore | None = None, size: int = 2, now_s: float = 1000.0) -> None:
        self.now_s = now_s
        self.size = size
        self.store = SlowStore(store or MemoryStore(lambda: self.now_s))
        self.effects: list[e.Effect] = []
        self.fail_on: type[e.Effect] | None = None
        self.controller = Controller(
            self.store,  # type: ignore[arg-type]
            self.plan_for,
            self.perform,
            self.supplement,
            lambda: self.now_s,
            TIMING,
        )

    def plan_for(
        self,
        job_id: JobId,
        idle: tuple[NodeId, ...],
        willing: tuple[NodeId, ...],
        holders: tuple[NodeId, ...],
        previous: str | None,
    ) -> Plan | e.Unplaced:
        if len(idle) < self.size:
            return e.Unplaced("not enough nodes", "start one", False, Reason.WAITING_FOR_NODES)
        return plan_on(idle[: self.size])

    def perform(self, effect: e.Effect) -> None:
        if self.fail_on is not None and isinstance(effect, self.fail_on):
            raise RuntimeError("this effect cannot be performed")
        self.effects.append(effect)

    async def supplement(
        self, before: JobView | None, after: JobView, record: Job, attempts: Sequence[Attempt]
    ) -> tuple[Job, Sequence[Write]]:
        return record, ()

    async def submit(self, name: str = "j-1") -> JobId:
        job_id = JobId(name)
        record = Job(job_id, "job", "me", JobState.SUBMITTED, Reason.NONE, b"{}", self.now_s, self.now_s)
        await self.controller.submit(record)
        await self.controller.post(e.Identified(job_id), change=lambda record: replace(record, profile_json=b"{}"))
        return job_id

    async def connect(self, *nodes: str, leases: Sequence[tuple[str, int, int]] = ()) -> None:
        held = tuple(HeldLease(JobId(j), Fence(f), r, AttemptState.RUNNING) for j, f, r in leases)
        for node in nodes:
            await self.controller.describe_node(NodeId(node), node, CAPACITY)
            await self.controller.post(e.NodeConnected(NodeId(node), node, Activity.IDLE, "", held))

    async def report(self, rank: int, state: AttemptState, *writes: Write, outcome: Outcome | None = None) -> str:
        job = self.controller.state.jobs[JobId("j-1")]
        node = next(a.node_id for a in job.attempts if a.rank == rank)
        return await self.controller.post(e.AttemptReported(node, job.job_id, job.fence, rank, state, outcome), *writes)

    async def running(self) -> None:
        await self.connect("a", "b")
        await self.submit()
        for rank in (0, 1):
            await self.report(rank, AttemptState.READY)

    async def tick(self, seconds: float = 1.0, heard: Sequence[str] = ()) -> None:
        self.now_s += seconds
        for node in heard:
            self.controller.heard(NodeId(node))
        await self.controller.post(e.Ticked())

    def job(self) -> JobView:
        return self.controller.state.jobs[JobId("j-1")]

    async def restart(self) -> Coordinator:
        """The process is gone; another one takes up its store."""
        again = Coordinator(self.store.real, self.size, self.now_s)
        await again.controller.recover()
        return again

    async def check(self) -> None:
        """What the controller believes is what the store has."""
        for job_id, job in self.controller.state.jobs.items():
            stored = await self.store.job(job_id)
            assert stored == self.controller.record(job_id)
            assert (stored.state, stored.fence) == (job.state, job.fence)
