"""The shell around the pure control loop: one event at a time, its difference made durable, then its effects.

Invariants: no effect happens and nothing is acknowledged before the transaction that records its cause. A failed commit
leaves the state as it was; the node that sent the cause sends it again. What has begun is carried to its end also when
its caller is cancelled (a stream that breaks, a client that goes): the store may have made it durable already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeVar

from coordinator import recovery
from coordinator.changes import Changes, Extra, Supplement, submitted_event
from coordinator.checkpoints import with_uploaded
from coordinator.control import events as e
from coordinator.control.state import State, Timing
from coordinator.control.step import step
from coordinator.records import Attempt, Job, Member
from coordinator.store.protocol import AppendEvent, PutJob, PutMember, Store, Write
from protos import documents
from protos.capacity import Capacity
from protos.errors import AccessError, NotFound
from protos.ids import Fence, JobId, NodeId
from protos.log import Log
from protos.plan import Plan
from protos.states import TERMINAL_JOB_STATES, Eligibility, JobState, NodeLink
from protos.work import Checkpoint, Checkpoints, StepTimes

log = Log("hive.coordinator.controller")

T = TypeVar("T")
EffectHandler = Callable[[e.Effect], None]


@lru_cache(maxsize=1024)
def _capacity(document: str) -> Capacity:
    return documents.decode(Capacity, document)


class Controller:
    """Owns the control state and the job records it stands for. `post` is the only way in."""

    def __init__(
        self,
        store: Store,
        plan_for: e.PlanFor,
        perform: EffectHandler,
        supplement: Supplement,
        clock: Callable[[], float],
        timing: Timing,
    ) -> None:
        self._store = store
        self._supplement = supplement
        self._plan_for = plan_for
        self._perform = perform
        self._clock = clock
        self._timing = timing
        self._lock = asyncio.Lock()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._records: dict[JobId, Job] = {}
        self._attempts: dict[tuple[JobId, Fence, int], Attempt] = {}
        self._members: dict[NodeId, Member] = {}
        self._heard: dict[NodeId, float] = {}
        self._progress: dict[JobId, Mapping[str, Any]] = {}
        self._step_times: dict[JobId, tuple[Fence, dict[int, StepTimes]]] = {}
        self._orders = 0
        self.state = State()

    async def recover(self) -> None:
        """Take up what the store holds. Nodes get a grace to come back before their work is given to others."""
        found = await recovery.load(self._store, self._clock(), self._timing)
        self.state, self._records, self._members = found.state, found.records, found.members
        self._attempts = found.attempts
        self._orders = found.orders
        await self._write_down_recovery()
        for job in self.state.jobs.values():
            if job.state is JobState.PLANNING:
                self._perform(e.Identify(job.job_id))

    async def _write_down_recovery(self) -> None:
        """The store refuses to skip a state, so what recovery concluded must be in it before the next step."""
        changes = Changes(self._records, self._attempts, self._members, self._supplement, self._clock())
        for job in list(self.state.jobs.values()):
            if job.trail:
                record = self._records[job.job_id]
                before = replace(job, state=record.state, reason=record.reason, message=record.message, trail=())
                await changes.job(before, job, None)
                self.state = self.state.with_job(replace(job, trail=()))
        for node in self.state.nodes.values():
            if self._members[node.node_id].link is not node.link:  # nobody is connected to one that just started
                changes.node(None, node)
        if changes.writes:
            await self._store.commit(*changes.writes)
        changes.keep()

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """One at a time, and whole: when the caller is cancelled the work goes on without it."""
        task = asyncio.create_task(self._alone(work))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await asyncio.shield(task)

    async def _alone(self, work: Coroutine[Any, Any, T]) -> T:
        async with self._lock:
            return await work

    def record(self, job_id: JobId) -> Job:
        """The record of an unfinished job. Raises NotFound."""
        if job_id not in self._records:
            raise NotFound(f"no unfinished job {job_id}", "hive ps --all lists all jobs")
        return self._records[job_id]

    def plan(self, job_id: JobId) -> Plan | None:
        job = self.state.jobs.get(job_id)
        return job.plan if job else None

    def capacity(self, node_id: NodeId) -> Capacity | None:
        """What a member had when it was last here."""
        member = self._members.get(node_id)
        return _capacity(member.capacity_json) if member and member.capacity_json else None

    def progress(self, job_id: JobId) -> Mapping[str, Any] | None:
        """The newest progress of an unfinished job; None until its nodes report again after a restart."""
        return self._progress.get(job_id)

    def note_progress(self, job_id: JobId, payload: Mapping[str, Any]) -> None:
        self._progress[job_id] = payload

    def note_step_times(self, job_id: JobId, fence: Fence, rank: int, times: StepTimes) -> None:
        known = self._step_times.get(job_id)
        ranks = known[1] if known is not None and known[0] == fence else {}
        self._step_times[job_id] = fence, {**ranks, rank: times}

    def step_times(self, job_id: JobId, fence: Fence) -> Mapping[int, StepTimes]:
        """What the ranks of this group said last, by rank."""
        known = self._step_times.get(job_id)
        return known[1] if known is not None and known[0] == fence else {}

    def times_now(self, job_id: JobId) -> list[tuple[int, NodeId, StepTimes]]:
        """Rank, node and what it said last of its steps, of the group that runs now; of none while none runs."""
        job = self.state.jobs.get(job_id)
        if job is None or job.state is not JobState.RUNNING:
            return []
        times = self.step_times(job_id, job.fence)
        return [(each.rank, each.node_id, times[each.rank]) for each in job.attempts if each.rank in times]

    def is_current(self, job_id: JobId, fence: Fence) -> bool:
        job = self.state.jobs.get(job_id)
        return job is not None and not job.ended and job.fence == fence and bool(job.working)

    def is_given(self, node_id: NodeId, job_id: JobId, fence: Fence, rank: int) -> bool:
        """Whether this rank of this generation of an unfinished job was offered to this node."""
        attempt = self._attempts.get((job_id, fence, rank))
        return attempt is not None and attempt.node_id == node_id

    def takes_part(self, node_id: NodeId, job_id: JobId, fence: Fence) -> bool:
        """Whether any rank of the current generation is this node's."""
        job = self.state.jobs.get(job_id)
        return job is not None and job.fence == fence and any(each.node_id == node_id for each in job.attempts)

    def heard(self, node_id: NodeId) -> None:
        """A sign of life: noted without a step, counted at the next tick."""
        self._heard[node_id] = self._clock()

    async def submit(self, record: Job) -> None:
        """Make a new job durable, then begin. Returns only when it cannot be lost any more."""
        await self._to_its_end(self._submit(record))

    async def _submit(self, record: Job) -> None:
        self._orders += 1
        self._records[record.job_id] = record
        try:
            await self._step(e.Submitted(record.job_id, self._orders), (PutJob(record, None), submitted_event(record)))
        except BaseException:
            self._records.pop(record.job_id, None)
            raise

    async def post(self, event: e.Event, *writes: Write, change: Extra | None = None) -> str:
        """Apply one event; `writes` and `change` (to the record of the event's job) go into the same transaction."""
        return await self._to_its_end(self._post(event, writes, change))

    async def _post(self, event: e.Event, writes: Sequence[Write], change: Extra | None) -> str:
        if isinstance(event, e.Ticked):
            self._count_signs_of_life()
        return await self._step(event, writes, change)

    async def describe_node(self, node_id: NodeId, name: str, capacity: Capacity) -> None:
        """Write down what a node has, when that changed."""
        await self._to_its_end(self._describe_node(node_id, name, capacity))

    async def _describe_node(self, node_id: NodeId, name: str, capacity: Capacity) -> None:
        document = documents.encode(capacity)
        known = await self._store.member(node_id)  # not from memory: whoever joins again is written by enrolment
        if known is not None and known.left:
            raise AccessError(f"{name} was removed from this cluster", "join again with a token: hive token create")
        if known is not None and known.capacity_json == document:
            self._members[node_id] = known
            return
        made = known or Member(node_id, name, "node", NodeLink.JOINING, Eligibility.OK, self._clock())
        made = replace(made, name=name, capacity_json=document)
        await self._store.commit(PutMember(made, known.version if known else None))
        self._members[node_id] = replace(made, version=(known.version if known else 0) + 1)

    async def checkpointed(self, job_id: JobId, fence: Fence, checkpoint: Checkpoint, accept: Write) -> None:
        """A checkpoint has been uploaded: remember the newest of an unfinished job, whichever generation made it."""
        await self._to_its_end(self._checkpointed(job_id, fence, checkpoint, accept))

    async def _checkpointed(self, job_id: JobId, fence: Fence, checkpoint: Checkpoint, accept: Write) -> None:
        record = self._records.get(job_id)
        known = (
            documents.decode(Checkpoints, record.checkpoint_json)
            if record and record.checkpoint_json
            else Checkpoints()
        )
        now = with_uploaded(known, checkpoint)
        if record is None or record.state in TERMINAL_JOB_STATES or now == known:
            await self._store.commit(accept)
            return
        changed = replace(record, checkpoint_json=documents.encode(now))
        event = AppendEvent("checkpoint", job_id, None, {"step": checkpoint.step, "fence": fence})
        await self._store.commit(accept, PutJob(changed, record.version), event)
        self._records[job_id] = replace(changed, version=record.version + 1)

    def _count_signs_of_life(self) -> None:
        nodes = dict(self.state.nodes)
        for node_id, when in self._heard.items():
            node = nodes.get(node_id)
            if node is not None and when > node.last_seen_s:
                nodes[node_id] = replace(node, last_seen_s=when)
        self._heard.clear()
        self.state = replace(self.state, nodes=MappingProxyType(nodes))

    async def _step(self, event: e.Event, extra: Sequence[Write], change: Extra | None = None) -> str:
        decision = step(self.state, event, self._clock(), self._plan_for, self._timing)
        changes = Changes(self._records, self._attempts, self._members, self._supplement, self._clock())
        for job_id, job in decision.state.jobs.items():
            before = self.state.jobs.get(job_id)
            if before is not None and before.ended:
                continue  # it waits to be forgotten: nothing changes an end
            mine = change if getattr(event, "job_id", None) == job_id else None
            if job is not before or mine is not None:
                await changes.job(before, job, mine)
        for node_id, node in decision.state.nodes.items():
            known = self.state.nodes.get(node_id)
            if node is not known:
                changes.node(known, node)
        if extra or changes.writes:
            await self._store.commit(*extra, *changes.writes)
        changes.keep()
        state = decision.state
        for job in list(state.jobs.values()):
            if job.trail or job.left is not None:
                state = state.with_job(replace(job, trail=(), left=None))
        self.state = state
        for effect in decision.effects:
            try:
                self._perform(effect)
            except Exception:  # its cause is durable: deadlines and reconnects see to it that it is asked again
                log.exception("an effect failed", effect=type(effect).__name__)
        return decision.reason

    def forget(self, job_id: JobId) -> None:
        """An ended job whose result is written: its record lives on in the store alone."""
        job = self.state.jobs.get(job_id)
        if job is not None and job.ended:
            self.state = self.state.without_job(job_id)
            self._records.pop(job_id, None)
            self._progress.pop(job_id, None)
            self._step_times.pop(job_id, None)
            for key in [key for key in self._attempts if key[0] == job_id]:
                del self._attempts[key]

    async def run_clock(self, interval_s: float) -> None:
        """Tick until cancelled; a failing tick is logged and the next one tries again."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.post(e.Ticked())
            except Exception:
                log.exception("tick failed")
