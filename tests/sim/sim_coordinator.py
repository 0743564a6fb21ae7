"""The coordinator of the simulation: the real Controller and MembershipService over a store that can crash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from coordinator.control import events as e
from coordinator.control.state import JobView
from coordinator.controller import Controller
from coordinator.membership import MembershipService
from coordinator.records import Attempt, Job
from coordinator.sessions import Session, Sessions
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import Accept, PutAttempt, PutJob, PutMember, Write
from protos import documents
from protos.capacity import Capacity
from protos.errors import Exhausted, HiveError
from protos.gen import membership_pb2 as pb
from protos.ids import Fence, JobId, NodeId, PlanId
from protos.plan import CoordinationPlan, CostEstimate, Plan, PlannedSubtask
from protos.states import Activity, Reason
from protos.work import Checkpoints, HeldLease, Resume, Task, TaskKind

if TYPE_CHECKING:
    from sim_network import Wire
    from sim_world import World

CAPACITY = Capacity("host", "machine", "linux", "3.11", 1.0, 1, 1, 1, 1)


class Crashed(BaseException):
    """The coordinator's process is gone at this point."""


class CrashingStore:
    """The real memory store; when armed, the process ends just before or just after the next commit."""

    def __init__(self, store: MemoryStore, world: World) -> None:
        self._store = store
        self._world = world
        self.armed: str | None = None
        self.full_until_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, *writes: Write) -> Any:
        if self.armed == "before":
            raise Crashed
        if self._world.clock.now_s < self.full_until_s:
            raise Exhausted("the disk is full", "free some space")
        done = await self._store.commit(*writes)
        for write in writes:
            if isinstance(write, Accept):
                self._world.watch.accepted(write)
            elif isinstance(write, PutJob):
                self._world.watch.wrote_job(write.job)
            elif isinstance(write, PutAttempt):
                self._world.watch.wrote_attempt(write.attempt)
        if self.armed == "after":
            raise Crashed
        return done


class SimCoordinator:
    def __init__(self, world: World, store: MemoryStore) -> None:
        self.world = world
        self.store = CrashingStore(store, world)
        self.sessions = Sessions()
        self.rendezvous: dict[tuple[JobId, Fence], dict[int, Any]] = {}
        self.wires: dict[int, Wire] = {}
        store_: Any = self.store
        nothing: Any = None
        self.controller = Controller(store_, self.plan_for, self.perform, self.supplement, world.clock, world.timing)
        self.members = MembershipService(
            nothing, self.controller, self.sessions, nothing, store_, nothing, replaced=lambda job_id, manifest: None
        )

    # ---- effects

    def perform(self, effect: e.Effect) -> None:
        try:
            self._perform(effect)
        except Exception as error:  # the controller goes on after a failed effect; a simulation does not
            self.world.failures.append(error)

    def _perform(self, effect: e.Effect) -> None:
        later = self.world.random.uniform(0.05, 1.0)
        match effect:
            case e.Identify(job_id):
                self._after(later, lambda: self._identify(job_id))
            case e.Offer(node_id, job_id, fence, rank):
                self._tell(node_id, ("offer", self._task(job_id, fence, rank)))
            case e.Stop(node_id, job_id, fence, mode, reason):
                self._tell(node_id, ("stop", job_id, fence, mode, reason))
            case e.CloseRendezvous(job_id, fence):
                self.rendezvous.pop((job_id, fence), None)
            case e.Finish(job_id):
                self._after(later, lambda: self._forget(job_id))

    def _after(self, delay_s: float, action: Any) -> None:
        def run() -> Any:
            return action() if self.world.coordinator is self else None

        self.world.clock.after(delay_s, run)

    def _tell(self, node_id: NodeId, message: Any) -> None:
        self.sessions.send(node_id, message)

    async def _identify(self, job_id: JobId) -> None:
        job = self.world.jobs[job_id]
        if not self.controller.state.willing() or self.world.faulty(0.2):
            await self.controller.post(e.IdentificationDelayed(job_id, "no node could say"))
        elif job.refused:
            await self.controller.post(
                e.Refused(job_id, Reason.MODEL_UNUSABLE, self.world.blame, "not a model", "convert it")
            )
        else:
            await self.controller.post(e.Identified(job_id), change=lambda record: self.world.with_profile(record))

    async def _forget(self, job_id: JobId) -> None:
        self.controller.forget(job_id)

    def _task(self, job_id: JobId, fence: Fence, rank: int) -> Task:
        view = self.controller.state.jobs[job_id]
        assert view.plan is not None
        record = self.controller.record(job_id)
        resume = None
        if record.checkpoint_json:
            newest = documents.decode(Checkpoints, record.checkpoint_json).newest
            resume = Resume(newest.step, self.world.empty_manifest) if newest is not None else None
        size = len(view.plan.subtasks)
        return Task(
            TaskKind.TRAIN, job_id, fence, rank, size, view.plan.strategy, self.world.spec, (1,) * size,
            deadline_s=view.plan.coordination_plan.deadline_s, resume=resume,
            ranks_here=sum(each.node_id == view.plan.subtasks[rank].node_id for each in view.plan.subtasks),
        )  # fmt: skip

    async def supplement(
        self, before: JobView | None, after: JobView, record: Job, attempts: Sequence[Attempt]
    ) -> tuple[Job, Sequence[Write]]:
        return record, ()

    def plan_for(
        self,
        job_id: JobId,
        idle: tuple[NodeId, ...],
        willing: tuple[NodeId, ...],
        holders: tuple[NodeId, ...],
        previous: str | None,
    ) -> Plan | e.Unplaced:
        job = self.world.jobs[job_id]
        assert set(idle) <= set(willing) and set(holders) <= set(idle)
        if job.unplaceable and willing:
            return e.Unplaced("over every node's memory", "add a node", True, Reason.NO_PLACEMENT)
        if len(idle) < job.nodes_min:
            busy = len(willing) >= job.nodes_min
            reason = Reason.WAITING_FOR_BUSY_NODES if busy else Reason.WAITING_FOR_NODES
            return e.Unplaced("not enough nodes", "start one", False, reason)
        chosen = [*holders, *(node for node in idle if node not in holders)][: job.nodes_max]
        return plan_on([node for node in chosen for _ in range(self.world.ranks(node))], self.world.timing.start_s)

    # ---- what the nodes say

    async def receive(self, wire: Wire, message: Any) -> None:
        """What cannot be made durable ends the stream: the node connects again and says it again."""
        try:
            await self._receive(wire, message)
        except Exhausted:
            self.world.disk_full += 1
            wire.unread = True
            self.world.network.cut(wire)

    async def _receive(self, wire: Wire, message: Any) -> None:
        if isinstance(message, pb.Hello):
            await self._hello(wire, message)
            return
        if wire.session is None:
            return
        match message:
            case pb.Heartbeat():
                await self.take(wire.session, pb.NodeMessage(heartbeat=message))
            case pb.Durable():
                await self._durable(wire.session, message)
            case pb.Leaving():
                await self.take(wire.session, pb.NodeMessage(leaving=message))

    async def take(self, session: Session, message: pb.NodeMessage) -> None:
        no_group: Any = None  # only calls of the rendezvous need one
        await self.members.take(session, message, no_group)

    async def _hello(self, wire: Wire, hello: pb.Hello) -> None:
        node_id = wire.node.node_id
        member = await self.store.member(node_id)
        if member is not None and member.left:  # it joined again with a token, as enrolment writes it
            await self.store.commit(PutMember(replace(member, left=False), member.version))
        session = Session(node_id, hello.name, hello.spool_id, CAPACITY)
        wire.session = session
        leases = documents.decode(tuple[HeldLease, ...], hello.leases_json)
        acknowledged = await self.store.accepted(node_id, hello.spool_id)
        session.send(pb.CoordinatorMessage(welcome=pb.Welcome(acknowledged_seq=acknowledged)))
        older = self.wires.pop(id(self.sessions.get(node_id)), None)
        self.sessions.add(session)
        if older is not None:
            self.world.network.cut(older)
        self.wires[id(session)] = wire
        await self.controller.describe_node(node_id, hello.name, CAPACITY)
        event = e.NodeConnected(node_id, hello.name, Activity(hello.activity), hello.activity_reason, leases)
        await self.controller.post(event)

    async def _durable(self, session: Session, message: pb.Durable) -> None:
        """An older group's word may change nothing but what is known of checkpoints."""
        job_id = JobId(message.job_id)
        before = self.controller.state.jobs.get(job_id)
        stale = before is not None and (message.fence != before.fence or before.ended)
        seen = await self.store.accepted(session.node_id, session.spool_id) >= message.seq
        await self.take(session, pb.NodeMessage(durable=message))
        after = self.controller.state.jobs.get(job_id)
        if before is not None and after is not None and (stale or seen) and before.fence == after.fence:
            same = ("step", "samples", "attempts", "wanted")
            assert [getattr(before, name) for name in same] == [getattr(after, name) for name in same], (
                f"{'a repeated' if seen else 'an outdated'} message changed {job_id}"
            )

    async def gone(self, wire: Wire) -> None:
        if wire.session is not None:
            self.wires.pop(id(wire.session), None)
            if self.sessions.remove(wire.session):
                await self.controller.post(e.NodeDisconnected(wire.node.node_id))

    def pump(self) -> None:
        """What the sessions queued goes onto the wires."""
        for wire in list(self.wires.values()):
            queue = wire.session.outgoing
            while not queue.empty():
                message = queue.get_nowait()
                if message is None:
                    self.world.network.cut(wire)
                else:
                    self.world.network.send_down(wire, message)

    async def user(self, job_id: JobId, action: str) -> str:
        """Empty when it was accepted, else why not."""
        try:
            await self.controller.post(e.UserAsked(job_id, action))
        except HiveError as error:
            return error.message
        return ""


def plan_on(nodes: Sequence[NodeId], deadline_s: float) -> Plan:
    """A rank for each; a node that is named twice has two."""
    subtasks = tuple(
        PlannedSubtask("train", node, rank, (rank, rank + 1), (0, 1), (1,), (1,)) for rank, node in enumerate(nodes)
    )
    return Plan(
        id=PlanId("p-simulated"),
        strategy="data_parallel" if len(nodes) > 1 else "single_node",
        reason="simulated",
        candidates=(),
        subtasks=subtasks,
        coordination_plan=CoordinationPlan("store", "loopback", (), (), deadline_s, 3),
        estimate=CostEstimate(1.0, 1.0, 1.0, {}),
        state=(0, 0, 0, 0),
    )
