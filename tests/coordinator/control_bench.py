"""A small cluster for tests of the pure control loop: events in by name, effects and states out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.control import events as e
from coordinator.control.state import JobView, State, Timing
from coordinator.control.step import step
from protos.errors import Blame
from protos.ids import Fence, JobId, NodeId, PlanId
from protos.plan import CoordinationPlan, CostEstimate, Plan, PlannedSubtask
from protos.states import Activity, AttemptState, JobState, Reason
from protos.work import Artifact, Digest, Fault, HeldLease, Outcome

TIMING = Timing(start_s=120.0, hold_s=20.0, stop_s=10.0)
PEER_LOST = Fault(Reason.PEER_LOST, Blame.NETWORK, "lost a peer", retryable=True)
USER_CODE = Fault(Reason.USER_CODE, Blame.USER_CODE, "ValueError: shapes", "fix the code")


def plan_on(nodes: Sequence[NodeId]) -> Plan:
    subtasks = tuple(PlannedSubtask("train", n, r, (r, r + 1), (0, 1), (1,), (1,)) for r, n in enumerate(nodes))
    return Plan(
        id=PlanId("p-test"),
        strategy="data_parallel" if len(nodes) > 1 else "single_node",
        reason="test",
        candidates=(),
        subtasks=subtasks,
        coordination_plan=CoordinationPlan("store", "loopback", (), (), 60.0, 3),
        estimate=CostEstimate(1.0, 1.0, 1.0, {}),
        state=(0, 0, 0, 0),
    )


@dataclass
class Bench:
    """`size` is how many nodes a job needs; `holders` and `previous` of the scheduler's last question are kept."""

    size: int = 2
    sizes: dict[str, int] = field(default_factory=dict)
    state: State = field(default_factory=State)
    now_s: float = 100.0
    effects: tuple[e.Effect, ...] = ()
    holders: tuple[NodeId, ...] = ()
    previous: str | None = None
    refuse: e.Unplaced | None = None
    jobs: int = 0

    def plan_for(
        self,
        job_id: JobId,
        idle: tuple[NodeId, ...],
        willing: tuple[NodeId, ...],
        holders: tuple[NodeId, ...],
        previous: str | None,
    ) -> Plan | e.Unplaced:
        self.holders, self.previous = holders, previous
        if self.refuse is not None:
            return self.refuse
        size = self.sizes.get(job_id, self.size)
        if len(idle) < size:
            busy = len(willing) >= size
            reason = Reason.WAITING_FOR_BUSY_NODES if busy else Reason.WAITING_FOR_NODES
            return e.Unplaced("not enough nodes", "start one", False, reason)
        return self.plan_of([*holders, *(node for node in idle if node not in holders)][:size], idle)

    def plan_of(self, nodes: Sequence[NodeId], idle: tuple[NodeId, ...]) -> Plan:
        """On the nodes that were chosen among the idle ones; tests with other planners change this."""
        return plan_on(nodes)

    def do(self, event: e.Event) -> tuple[e.Effect, ...]:
        decision = step(self.state, event, self.now_s, self.plan_for, TIMING)
        self.state, self.effects = decision.state, decision.effects
        assert decision.reason
        return decision.effects

    def wait(self, seconds: float, *, heard: Sequence[str] = (), every_s: float = 1.0) -> list[e.Effect]:
        """Time passes in ticks; `heard` nodes give signs of life."""
        done: list[e.Effect] = []
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(self.now_s + every_s, end_s)
            for node in heard:
                self.do(e.NodeHeard(NodeId(node)))
            done += self.do(e.Ticked())
        return done

    def connect(self, *nodes: str, leases: Sequence[tuple[str, int, int]] = (), activity: Activity = Activity.IDLE):  # type: ignore[no-untyped-def]
        held = tuple(HeldLease(JobId(j), Fence(f), r, AttemptState.RUNNING) for j, f, r in leases)
        effects: list[e.Effect] = []
        for node in nodes:
            effects += self.do(e.NodeConnected(NodeId(node), node, activity, "", held))
        return effects

    def submit(self, job_id: str = "j-1") -> None:
        """Submitted and identified."""
        self.jobs += 1
        self.do(e.Submitted(JobId(job_id), self.jobs))
        self.do(e.Identified(JobId(job_id)))

    def job(self, job_id: str = "j-1") -> JobView:
        return self.state.jobs[JobId(job_id)]

    def report(
        self,
        rank: int,
        state: AttemptState,
        outcome: Outcome | None = None,
        *,
        job_id: str = "j-1",
        fence: int | None = None,
        node: str | None = None,
    ) -> tuple[e.Effect, ...]:
        job = self.job(job_id)
        where = node or next(a.node_id for a in job.attempts if a.rank == rank)
        return self.do(e.AttemptReported(NodeId(where), JobId(job_id), Fence(fence or job.fence), rank, state, outcome))

    def progress(self, at: int, job_id: str = "j-1") -> None:
        job = self.job(job_id)
        self.do(e.Progressed(job.attempts[0].node_id, job.job_id, job.fence, at, at * 32))

    def ready(self, job_id: str = "j-1") -> None:
        """Every rank accepts and is ready: the job runs."""
        for state in (AttemptState.ACCEPTED, AttemptState.READY):
            for attempt in self.job(job_id).attempts:
                self.report(attempt.rank, state, job_id=job_id)

    def running(self, *nodes: str) -> None:
        """A job in training on these nodes."""
        self.size = len(nodes)
        self.connect(*nodes)
        self.submit()
        self.ready()
        assert self.job().state is JobState.RUNNING

    def fail(self, rank: int, held: int | None = None, fault: Fault = PEER_LOST, **more: object):  # type: ignore[no-untyped-def]
        outcome = Outcome(AttemptState.FAILED, held or 0, (held or 0) * 32, fault=fault, held_step=held)
        return self.report(rank, AttemptState.FAILED, outcome, **more)  # type: ignore[arg-type]

    def finish(self, rank: int, at: int = 10) -> tuple[e.Effect, ...]:
        artifacts = (Artifact("model.safetensors", Digest("0" * 64), 1),) if rank == 0 else ()
        return self.report(rank, AttemptState.DONE, Outcome(AttemptState.DONE, at, at * 32, artifacts=artifacts))

    def offers(self) -> list[tuple[str, int, int]]:
        return [(o.node_id, o.fence, o.rank) for o in self.effects if isinstance(o, e.Offer)]


def stops(effects: Sequence[e.Effect]) -> list[tuple[str, int, str]]:
    return [(s.node_id, s.fence, s.mode.value) for s in effects if isinstance(s, e.Stop)]
