"""A whole cluster in one seed: coordinator, nodes, wires, users and faults, one action at a time.

Deterministic: all chance comes from one random.Random(seed). Faults happen until `faults_s`; then everything is mended
and the invariants of liveness must come true within `settle_s`. What a wire does to messages is in sim_network: durable
ones are doubled, a cut loses some of what is under way, and the rest comes late, to the old stream, perhaps after the
new one has said hello. Within one stream nothing changes places.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sim_clock import Clock
from sim_coordinator import Crashed, SimCoordinator, plan_on
from sim_invariants import Watch
from sim_network import Network
from sim_node import MemorySpool, SimNode

from coordinator.control import events as e
from coordinator.control.state import Timing
from coordinator.records import Job
from coordinator.store.memory import MemoryStore
from node import agent
from node.spool import Spool
from protos import jobspec
from protos.artifact import Manifest
from protos.errors import Blame, Exhausted, HiveError
from protos.ids import Digest, JobId, NodeId
from protos.states import TERMINAL_JOB_STATES, JobState, Reason

TICK_S = 0.5


@dataclass(slots=True)
class SimJob:
    total: int
    nodes_min: int
    nodes_max: int
    fails_at: int | None = None
    refused: bool = False
    unplaceable: bool = False
    acknowledged: bool = False
    asked: str = ""  # the last request that was accepted


@dataclass(frozen=True, slots=True)
class Faults:
    """How often things go wrong, per simulated second."""

    cut: float = 0.05
    duplicate: float = 0.1  # per durable message
    node_crash: float = 0.02
    coordinator_crash: float = 0.02
    freeze: float = 0.02
    partition: float = 0.02
    owner: float = 0.01
    administrator: float = 0.01
    user: float = 0.03
    disk: float = 0.005
    revise: float = 0.2  # a better plan for a running job, also where none is


CALM = Faults(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(eq=False)
class World:
    seed: int
    faults: Faults = field(default_factory=Faults)
    nodes_count: int | None = None
    jobs_count: int | None = None
    ranks_most: int = 1  # a node has up to so many GPUs
    faults_s: float = 60.0
    settle_s: float = 400.0
    spool_folder: Path | None = None

    spec = jobspec.parse({"model": {"source": "model.py:build"}, "data": {"source": "builtin:digits"}})
    batch = 32
    digest = Digest("0" * 64)
    blame = Blame.USER_CODE
    empty_manifest = Manifest(())
    timing = Timing(identify_s=15.0, start_s=20.0, hold_s=12.0, stop_s=8.0, reconnect_grace_s=8.0)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.clock = Clock()
        self.store = MemoryStore(self.clock)
        self.watch = Watch(self)
        self.network = Network(self)
        self.progress: dict[JobId, int] = {}
        self.partitions: dict[NodeId, float] = {}
        self.failures: list[Exception] = []
        self.disk_full = 0
        self.reviser = random.Random(f"revise/{self.seed}")
        self.revised = 0  # and was taken
        self.coordinator: SimCoordinator | None = None
        self.mended = False
        count = self.nodes_count or self.random.randint(1, 4)
        self.nodes = [SimNode(self, NodeId(f"n-{i}"), self._spool(i), self._gpus()) for i in range(count)]
        self.jobs: dict[JobId, SimJob] = {}
        for i in range(self.jobs_count or self.random.randint(1, 4)):
            self.jobs[JobId(f"j-{i}")] = self._job(count)

    def _spool(self, number: int) -> Callable[[], Any]:
        if self.spool_folder is not None:
            folder = self.spool_folder / f"n-{number}"
            return lambda: Spool(folder)
        kept = MemorySpool(f"s-{number}")
        return lambda: kept

    def _gpus(self) -> int:
        return self.random.randint(1, self.ranks_most) if self.ranks_most > 1 else 1

    def ranks(self, node_id: NodeId) -> int:
        return next(node.ranks for node in self.nodes if node.node_id == node_id)

    def _job(self, nodes: int) -> SimJob:
        least = self.random.randint(1, nodes)
        job = SimJob(self.random.randint(1, 60), least, self.random.randint(least, nodes))
        chance = self.random.random()
        if chance < 0.08:
            job.fails_at = self.random.randint(1, job.total)
        elif chance < 0.12:
            job.refused = True
        elif chance < 0.16:
            job.unplaceable = True
        return job

    def faulty(self, chance: float) -> bool:
        return not self.mended and self.faults is not CALM and self.random.random() < chance

    def committed(self, job_id: JobId, step: int) -> None:
        self.progress[job_id] = max(step, self.progress.get(job_id, 0))

    # ---- the run

    async def run(self) -> None:
        await self._start_coordinator()
        for node in self.nodes:
            node.start()
        for job_id in self.jobs:
            self.clock.after(self.random.uniform(0.0, 30.0), lambda job_id=job_id: self._submit(job_id))
        self._plan_faults()
        end_s = self.clock.now_s + self.faults_s
        self.clock.at(end_s, self._mend)
        limit_s = end_s + self.settle_s
        while self.clock.now_s < limit_s:
            action = self.clock.take()
            try:
                await self._perform(action)
                if self.coordinator is not None:
                    self.coordinator.pump()
            except Crashed:
                self._crash_coordinator()
            await self.watch.between_steps()
            if self.mended and self._quiet():
                break
        await self.watch.at_the_end()

    async def _perform(self, action: Any) -> None:
        """A full disk fails what was asked; whoever asked logs it or repeats it, as the daemon's shells do."""
        try:
            waiting = action()
            if waiting is not None:
                await waiting
        except Exhausted:
            self.disk_full += 1

    def unfinished(self) -> list[JobId]:
        assert self.coordinator is not None
        return [job_id for job_id, job in self.coordinator.controller.state.jobs.items() if not job.ended]

    def _quiet(self) -> bool:
        if self.coordinator is None or any(not job.acknowledged for job in self.jobs.values()):
            return False
        state = self.coordinator.controller.state
        left = [job for job in state.jobs.values() if not job.ended]
        if any(job.state is not JobState.PAUSED or self.jobs[job.job_id].asked in ("", "cancel") for job in left):
            return False
        return not any(node.workers or node.spool.waiting() or node.state.works for node in self.nodes)

    async def _start_coordinator(self) -> None:
        made = SimCoordinator(self, self.store)
        await made.controller.recover()
        self.coordinator = made
        self._tick(made)

    def _tick(self, coordinator: SimCoordinator) -> None:
        async def tick() -> None:
            if self.coordinator is coordinator:
                try:
                    await coordinator.controller.post(e.Ticked())
                finally:
                    self._tick(coordinator)

        self.clock.after(TICK_S, tick)

    def _crash_coordinator(self) -> None:
        crashed, self.coordinator = self.coordinator, None
        if crashed is not None:
            for wire in list(crashed.wires.values()):
                self.network.cut(wire)
            self.clock.after(self.random.uniform(0.2, 10.0), self._start_coordinator)

    # ---- the network

    def partitioned(self, node_id: NodeId) -> bool:
        return self.partitions.get(node_id, 0.0) > self.clock.now_s

    # ---- users

    async def _submit(self, job_id: JobId) -> None:
        """A client that repeats until it is told that the job is safe."""
        if self.jobs[job_id].acknowledged:
            return
        coordinator = self.coordinator
        if coordinator is not None and not self.faulty(0.1):
            self.clock.after(1.0, lambda: self._submit(job_id))
            known = await coordinator.store.job_by_idempotency_key(job_id)
            if known is None:
                now_s = self.clock.now_s
                record = Job(
                    job_id, "job", "somebody", JobState.SUBMITTED, Reason.NONE, b"{}", now_s, now_s,
                    idempotency_key=job_id,
                )  # fmt: skip
                await coordinator.controller.submit(record)
            self.jobs[job_id].acknowledged = True
        else:
            self.clock.after(1.0, lambda: self._submit(job_id))

    def with_profile(self, record: Job) -> Job:
        return replace(record, profile_json=b"{}")

    async def _user(self, action: str | None = None) -> None:
        job_id = self.random.choice(list(self.jobs))
        job = self.jobs[job_id]
        if self.coordinator is None or not job.acknowledged:
            return
        stored = await self.store.job(job_id)
        over = stored is not None and stored.state in TERMINAL_JOB_STATES
        action = action or self.random.choice(["pause", "pause", "resume", "resume", "cancel"])
        before, job.asked = job.asked, f"perhaps {action}"  # when the coordinator dies before it answers
        refused = await self.coordinator.user(job_id, action)
        job.asked = before if refused or over else "" if action == "resume" else action

    # ---- faults

    def _plan_faults(self) -> None:
        self._often(self.faults.cut, self._cut_one)
        self._often(self.faults.node_crash, self._kill_node)
        self._often(self.faults.coordinator_crash, self._arm_crash)
        self._often(self.faults.freeze, self._freeze_node)
        self._often(self.faults.partition, self._partition)
        self._often(self.faults.owner, self._owner)
        self._often(self.faults.administrator, self._administrator)
        self._often(self.faults.user, self._user)
        self._often(self.faults.disk, self._fill_disk)
        self._often(self.faults.revise, self._revise, self.reviser)

    def _often(self, per_s: float, action: Callable[[], Any], drawn: random.Random | None = None) -> None:
        drawn = drawn or self.random
        when_s = drawn.expovariate(per_s) if per_s else self.faults_s
        while when_s < self.faults_s:
            self.clock.after(when_s, action)
            when_s += drawn.expovariate(per_s)

    async def _revise(self) -> None:
        """Over any of its nodes and the idle ones; what was decided may be a little out of date."""
        if self.coordinator is None:
            return
        state = self.coordinator.controller.state
        running = [job for job in state.jobs.values() if job.state is JobState.RUNNING]
        if not running:
            return
        job = self.reviser.choice(running)
        own = {attempt.node_id for attempt in job.attempts}
        nodes = sorted(own | set(state.idle()))
        least, most = self.jobs[job.job_id].nodes_min, self.jobs[job.job_id].nodes_max
        if len(nodes) < least:
            return
        count = self.reviser.randint(least, min(most, len(nodes)))
        chosen = self.reviser.sample(nodes, count)
        plan = plan_on([node for node in chosen for _ in range(self.ranks(node))], self.timing.start_s)
        fence = type(job.fence)(max(1, job.fence - (self.reviser.random() < 0.1)))
        self.clock.after(
            self.reviser.uniform(0.0, 2.0), lambda: self._revised(e.Revised(job.job_id, fence, plan, "better"))
        )

    async def _revised(self, event: e.Revised) -> None:
        if self.coordinator is not None:
            await self.coordinator.controller.post(event)
            job = self.coordinator.controller.state.jobs.get(event.job_id)
            self.revised += job is not None and job.next_plan is event.plan

    def _cut_one(self) -> None:
        node = self.random.choice(self.nodes)
        if node.dialled is not None:
            self.network.cut(node.dialled)

    def _kill_node(self) -> None:
        node = self.random.choice(self.nodes)
        if node.up:
            if self.random.random() < 0.5:
                node.leave()
            node.kill()
            self.clock.after(self.random.uniform(0.3, 15.0), lambda: None if node.up else node.start())

    def _arm_crash(self) -> None:
        if self.coordinator is not None:
            when = self.random.choice(["now", "before", "after"])
            if when == "now":
                raise Crashed
            self.coordinator.store.armed = when

    def _fill_disk(self) -> None:
        if self.coordinator is not None:
            self.coordinator.store.full_until_s = self.clock.now_s + self.random.uniform(0.1, 5.0)

    def _freeze_node(self) -> None:
        node = self.random.choice(self.nodes)
        if node.up and not node.frozen:
            node.freeze()
            self.clock.after(self.random.uniform(1.0, 20.0), node.thaw)

    def _partition(self) -> None:
        node = self.random.choice(self.nodes)
        self.partitions[node.node_id] = self.clock.now_s + self.random.uniform(0.5, 15.0)
        if node.dialled is not None:
            self.network.cut(node.dialled)

    def _owner(self) -> None:
        node = self.random.choice(self.nodes)
        if node.up and not node.frozen:
            node.apply(agent.OwnerAsked(self.random.choice(["pause", "drain"]), "the owner plays a game"))
            self.clock.after(self.random.uniform(1.0, 20.0), lambda: self._owner_resumes(node))

    def _owner_resumes(self, node: SimNode) -> None:
        if node.up:
            node.when_awake(lambda: node.apply(agent.OwnerAsked("resume", "")))

    async def _administrator(self) -> None:
        node = self.random.choice(self.nodes)
        action = self.random.choice(["cordon", "drain", "uncordon", "remove"])
        await self._control(node, action)

    async def _control(self, node: SimNode, action: str) -> None:
        if self.coordinator is None:
            return
        try:
            await self.coordinator.controller.post(e.NodeControlled(node.node_id, action))
        except HiveError:
            return  # not a member yet
        if action == "remove" and (session := self.coordinator.sessions.get(node.node_id)) is not None:
            session.close()

    async def _mend(self) -> None:
        """From here on nothing fails any more."""
        self.mended = True
        self.partitions.clear()
        if self.coordinator is not None:
            self.coordinator.store.armed = None
            self.coordinator.store.full_until_s = 0.0
        for node in self.nodes:
            if node.frozen:
                node.thaw()
            if not node.up:
                node.start()
            self._owner_resumes(node)
        self.clock.after(1.0, self._uncordon)

    async def _uncordon(self) -> None:
        if self.coordinator is None:
            self.clock.after(1.0, self._uncordon)
            return
        for node in self.nodes:
            await self._control(node, "uncordon")
