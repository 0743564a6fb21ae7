"""A node of the simulation: the real agent and a real (or in-memory) spool around fake workers and a fake wire."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sim_network import Wire
from sim_workers import Worker

from node import agent
from protos import documents
from protos.gen import membership_pb2 as pb
from protos.ids import Fence, JobId, NodeId
from protos.states import AttemptState, StopMode
from protos.work import HeldLease, Outcome, Task

if TYPE_CHECKING:
    from sim_world import World

SILENCE_S = 10.0


class AnySpool(Protocol):
    spool_id: str

    def append(self, message: pb.Durable) -> pb.Durable | None: ...
    def acknowledge(self, seq: int) -> list[pb.Durable]: ...
    def waiting(self, after_seq: int = 0) -> list[pb.Durable]: ...
    def reports(self) -> list[pb.Durable]: ...
    def close(self) -> None: ...


class MemorySpool:
    """The idea of node.spool.Spool without a disk: what it holds survives the daemon because the node keeps it."""

    def __init__(self, spool_id: str) -> None:
        self.spool_id = spool_id
        self._waiting: deque[pb.Durable] = deque()
        self._seq = 0

    def append(self, message: pb.Durable) -> pb.Durable | None:
        self._seq += 1
        message.seq = self._seq
        self._waiting.append(message)
        return message

    def acknowledge(self, seq: int) -> list[pb.Durable]:
        done = []
        while self._waiting and self._waiting[0].seq <= seq:
            done.append(self._waiting.popleft())
        return done

    def waiting(self, after_seq: int = 0) -> list[pb.Durable]:
        return [message for message in self._waiting if message.seq > after_seq]

    def reports(self) -> list[pb.Durable]:
        return [m for m in self._waiting if m.WhichOneof("body") == "report" and m.report.outcome_json]

    def close(self) -> None:
        return None


@dataclass(eq=False)
class SimNode:
    world: World
    node_id: NodeId
    open_spool: Callable[[], AnySpool]
    ranks: int = 1  # of one job, as many as it has GPUs
    state: agent.State = field(default_factory=agent.State)
    disk: dict[JobId, int] = field(default_factory=dict)
    workers: dict[agent.Key, Worker] = field(default_factory=dict)
    life: int = 0  # grows with every start of the daemon
    up: bool = True
    frozen: bool = False
    wire: Wire | None = None  # set once the coordinator has welcomed this node
    dialled: Wire | None = None
    heard_s: float = 0.0
    final_reports: set[tuple[int, JobId, Fence, int]] = field(default_factory=set)
    _deferred: list[Callable[[], object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spool = self.open_spool()

    # ---- life

    def start(self) -> None:
        self.up = True
        self.life += 1
        self.state = agent.State()
        self.heard_s = self.world.clock.now_s
        self._beat(self.life)
        self._dial_later(self.life)

    def leave(self) -> None:
        """The last word of a daemon that its owner stops; nobody waits until it has been read."""
        if self.wire is not None and not self.frozen:
            self.world.network.send_up(self.wire, pb.Leaving(reason="its owner stopped it"))

    def kill(self) -> None:
        """The daemon dies and its workers with it; spool and checkpoints stay."""
        self.up = False
        self.life += 1
        self._deferred.clear()
        self.frozen = False
        for worker in self.workers.values():
            worker.alive = False
        self.workers.clear()
        if self.dialled is not None:
            self.world.network.cut(self.dialled)
        self.wire = self.dialled = None
        self.spool.close()
        self.spool = self.open_spool()

    def freeze(self) -> None:
        self.frozen = self.up

    def thaw(self) -> None:
        self.frozen = False
        deferred, self._deferred = self._deferred, []
        for action in deferred:
            if not self.frozen:
                action()

    def when_awake(self, action: Callable[[], object]) -> None:
        if self.frozen:
            self._deferred.append(action)
        else:
            action()

    def _repeat(self, delay_s: float, life: int, action: Callable[[int], None]) -> None:
        def run() -> None:
            if self.life == life:
                self.when_awake(lambda: action(life) if self.life == life else None)

        self.world.clock.after(delay_s, run)

    # ---- the session

    def _beat(self, life: int) -> None:
        if self.wire is not None:
            if self.world.clock.now_s - self.heard_s > SILENCE_S:
                self.world.network.cut(self.wire)
            else:
                self.world.network.send_up(self.wire, self.heartbeat())
        self._repeat(1.0, life, self._beat)

    def heartbeat(self) -> pb.Heartbeat:
        activity, reason = self.state.activity
        return pb.Heartbeat(activity=activity.value, activity_reason=reason)

    def _dial_later(self, life: int) -> None:
        self._repeat(self.world.random.uniform(0.2, 2.0), life, self._dial)

    def _dial(self, life: int) -> None:
        if self.dialled is None and self.world.coordinator is not None and not self.world.partitioned(self.node_id):
            self.dialled = Wire(self, self.world.coordinator, life)
            self.world.network.send_up(self.dialled, self.hello())
            self.world.clock.after(
                10.0, lambda wire=self.dialled: None if wire.welcomed else self.world.network.cut(wire)
            )
        self._dial_later(life)

    def hello(self) -> pb.Hello:
        leases = {(lease.job_id, lease.fence, lease.rank): lease for lease in self.state.leases()}
        for message in self.spool.reports():
            key = (JobId(message.job_id), Fence(message.fence), message.rank)
            leases.setdefault(key, HeldLease(*key, AttemptState(message.report.state)))
        activity, reason = self.state.activity
        return pb.Hello(
            name=self.node_id,
            leases_json=documents.encode_as(tuple[HeldLease, ...], tuple(leases.values())),
            spool_id=self.spool.spool_id,
            activity=activity.value,
            activity_reason=reason,
        )

    def lost_wire(self, wire: Wire) -> None:
        if self.dialled is wire:
            self.wire = self.dialled = None

    def send_durable(self, message: pb.Durable) -> None:
        stored = self.spool.append(message)
        if stored is not None and self.wire is not None:
            self.world.network.send_up(self.wire, stored)

    def receive(self, wire: Wire, message: Any) -> None:
        if self.dialled is not wire or not self.up:
            return
        self.heard_s = self.world.clock.now_s
        match message:
            case pb.CoordinatorMessage():
                self._receive_message(wire, message)
            case ("offer", Task() as task):
                self.apply(agent.Offered(task))
            case ("stop", job_id, fence, mode, why):
                self.apply(agent.StopAsked(job_id, fence, mode, why))

    def _receive_message(self, wire: Wire, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("body"):
            case "welcome":
                wire.welcomed = True
                self.wire = wire
                self._acknowledged(message.welcome.acknowledged_seq)
                for durable in self.spool.waiting():
                    self.world.network.send_up(wire, durable)
            case "acknowledged":
                self._acknowledged(message.acknowledged.seq)

    def _acknowledged(self, seq: int) -> None:
        for durable in self.spool.acknowledge(seq):
            if durable.WhichOneof("body") == "report" and durable.report.outcome_json:
                self.apply(agent.Acknowledged(JobId(durable.job_id), Fence(durable.fence), durable.rank))

    # ---- the agent's effects

    def apply(self, event: agent.Event) -> None:
        before = self.state.activity
        decision = agent.step(self.state, event)
        self.state = decision.state
        for effect in decision.effects:
            match effect:
                case agent.Start(task):
                    running = {worker.key for worker in self.workers.values() if worker.alive}
                    key = agent.key_of(task)
                    assert key not in running, f"{self.node_id} starts {key} twice"
                    assert {other[:2] for other in running} <= {key[:2]}, (
                        f"{self.node_id} starts {key} beside {running}"
                    )
                    worker = Worker(self.world, self, task, self.life)
                    self.workers[worker.key] = worker
                    worker.begin()
                case agent.StopWorker(job_id, fence, rank, mode, _):
                    if (job_id, fence, rank) in self.workers:
                        self._stop(self.workers[job_id, fence, rank], mode)
                case agent.Report(job_id, fence, rank, state, outcome):
                    self._report(job_id, fence, rank, state, outcome)
        if self.state.activity != before and self.wire is not None:
            self.world.network.send_up(self.wire, self.heartbeat())

    def _stop(self, worker: Worker, mode: StopMode) -> None:
        worker.stop(mode)

    def _report(self, job_id: JobId, fence: Fence, rank: int, state: AttemptState, outcome: Outcome | None) -> None:
        if outcome is not None:
            key = (self.life, job_id, fence, rank)
            assert key not in self.final_reports, f"{self.node_id} reports the end of {job_id}/{fence}/{rank} twice"
            self.final_reports.add(key)
        message = pb.Durable(job_id=job_id, fence=fence, rank=rank)
        message.report.state = state.value
        if outcome is not None:
            message.report.outcome_json = documents.encode(outcome)
        self.send_durable(message)
