"""What a node does next: leases, workers, reports, and the owner's word. Scenarios, and a state machine over all."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from node import agent
from node.agent import Acknowledged, Offered, OwnerAsked, Phase, StopAsked, WorkerEnded, WorkerProgressed, WorkerReady
from protos import jobspec
from protos.errors import Blame
from protos.ids import Fence, JobId
from protos.states import ATTEMPT_TRANSITIONS, Activity, AttemptState, Reason, StopMode
from protos.work import Fault, HeldLease, Outcome, Task, TaskKind

SPEC = jobspec.parse({"model": {"source": "model.py:build"}, "data": {"source": "builtin:digits"}})
JOB, OTHER = JobId("j-1"), JobId("j-2")
DONE = Outcome(AttemptState.DONE, 10, 320)
HELD = Outcome(
    AttemptState.FAILED, 5, 160, fault=Fault(Reason.PEER_LOST, Blame.NETWORK, "held", retryable=True), held_step=5
)


def task(job_id: JobId = JOB, fence: int = 1, rank: int = 0) -> Task:
    return Task(TaskKind.TRAIN, job_id, Fence(fence), rank, 2, "data_parallel", SPEC, (16, 16))


class Node:
    """The agent with what it did last."""

    def __init__(self) -> None:
        self.state = agent.State()

    def do(self, event: agent.Event) -> tuple[agent.Effect, ...]:
        decision = agent.step(self.state, event)
        assert decision.reason
        self.state = decision.state
        return decision.effects

    def offer(self, job_id: JobId = JOB, fence: int = 1, rank: int = 0) -> tuple[agent.Effect, ...]:
        return self.do(Offered(task(job_id, fence, rank)))

    def works(self, job_id: JobId = JOB, fence: int = 1, rank: int = 0) -> None:
        self.offer(job_id, fence, rank)
        self.do(WorkerReady(job_id, Fence(fence), rank))
        self.do(WorkerProgressed(job_id, Fence(fence), rank, 3))

    def lease(self, fence: int = 1, job_id: JobId = JOB) -> HeldLease:
        return next(lease for lease in self.state.leases() if (lease.job_id, lease.fence) == (job_id, fence))


def reports(effects: tuple[agent.Effect, ...]) -> list[tuple[int, str]]:
    return [(effect.fence, effect.state.value) for effect in effects if isinstance(effect, agent.Report)]


def test_a_lease_goes_from_offer_to_a_report_that_is_acknowledged() -> None:
    node = Node()
    effects = node.offer()
    assert reports(effects) == [(1, "ACCEPTED")]
    assert effects[-1] == agent.Start(task())
    assert node.state.activity == (Activity.BUSY, "works on j-1")
    assert reports(node.do(WorkerReady(JOB, Fence(1), 0))) == [(1, "READY")]
    assert reports(node.do(WorkerProgressed(JOB, Fence(1), 0, 1))) == [(1, "RUNNING")]
    assert reports(node.do(WorkerProgressed(JOB, Fence(1), 0, 2))) == []
    assert reports(node.do(WorkerEnded(JOB, Fence(1), 0, DONE))) == [(1, "DONE")]
    assert node.state.activity == (Activity.IDLE, "")
    assert node.lease().state is AttemptState.DONE  # presented until the coordinator has it
    assert node.do(Acknowledged(JOB, Fence(1), 0)) == ()
    assert node.state.leases() == ()


def test_an_offer_that_comes_twice_starts_one_worker() -> None:
    node = Node()
    node.offer()
    assert node.offer() == ()


def test_the_next_group_starts_when_the_last_worker_has_ended() -> None:
    node = Node()
    node.works()
    effects = node.offer(fence=2)
    assert agent.StopWorker(JOB, Fence(1), 0, StopMode.HOLD, "a new group is forming") in effects
    assert not any(isinstance(effect, agent.Start) for effect in effects)
    effects = node.do(WorkerEnded(JOB, Fence(1), 0, HELD))
    assert reports(effects) == [(1, "FAILED")]
    assert effects[-1] == agent.Start(task(fence=2))


def test_a_group_that_still_waits_is_replaced_by_the_next() -> None:
    node = Node()
    node.works()
    node.offer(fence=2)
    effects = node.offer(fence=3)
    assert (2, "FAILED") in reports(effects)
    assert node.do(WorkerEnded(JOB, Fence(1), 0, HELD))[-1] == agent.Start(task(fence=3))


def test_a_busy_node_refuses_another_job() -> None:
    node = Node()
    node.works()
    (refusal,) = node.offer(OTHER)
    assert isinstance(refusal, agent.Report)
    assert refusal.outcome is not None
    assert refusal.outcome.fault is not None
    assert refusal.outcome.fault.retryable
    assert "j-1" in refusal.outcome.fault.message


def test_an_offer_that_was_stopped_before_it_came_is_answered_not_ignored() -> None:
    """Silence would leave the coordinator waiting for the whole start deadline."""
    node = Node()
    node.do(StopAsked(JOB, Fence(2), StopMode.CANCEL, "too late"))
    effects = node.offer(fence=2)
    assert reports(effects) == [(2, "FAILED")]
    assert node.offer(fence=3)[-1] == agent.Start(task(fence=3))


def test_a_stop_ends_the_worker_and_a_harder_one_may_follow() -> None:
    node = Node()
    node.works()
    assert node.do(StopAsked(JOB, Fence(1), StopMode.HOLD, "peer lost")) == (
        agent.StopWorker(JOB, Fence(1), 0, StopMode.HOLD, "peer lost"),
    )
    assert node.do(StopAsked(JOB, Fence(1), StopMode.HOLD, "again")) == ()
    assert len(node.do(StopAsked(JOB, Fence(1), StopMode.CANCEL, "cancelled"))) == 1
    assert node.do(StopAsked(JOB, Fence(1), StopMode.HOLD, "too mild")) == ()
    assert reports(node.do(WorkerEnded(JOB, Fence(1), 0, HELD))) == [(1, "FAILED")]


def test_a_stop_of_a_group_that_waits_ends_it_without_a_worker() -> None:
    node = Node()
    node.works()
    node.offer(fence=2)
    assert reports(node.do(StopAsked(JOB, Fence(2), StopMode.HOLD, "dissolved"))) == [(2, "FAILED")]
    assert reports(node.do(WorkerEnded(JOB, Fence(1), 0, HELD))) == [(1, "FAILED")]
    assert node.state.activity[0] is Activity.IDLE


@pytest.mark.parametrize("action", ["pause", "drain"])
def test_the_owner_gets_the_machine_back(action: str) -> None:
    node = Node()
    node.works()
    assert node.do(OwnerAsked(action, "a game")) == (agent.StopWorker(JOB, Fence(1), 0, StopMode.PAUSE, "a game"),)
    assert node.state.activity == (Activity.PAUSED, "a game")
    assert reports(node.offer(OTHER)) == [(1, "FAILED")]
    node.do(WorkerEnded(JOB, Fence(1), 0, HELD))
    node.do(OwnerAsked("resume", ""))
    assert node.state.activity == (Activity.IDLE, "")
    assert reports(node.offer(OTHER, fence=2)) == [(2, "ACCEPTED")]


def test_a_pause_also_ends_what_only_waits() -> None:
    node = Node()
    node.works()
    node.offer(fence=2)
    effects = node.do(OwnerAsked("pause", "a game"))
    assert reports(effects) == [(2, "FAILED")]
    assert not any(isinstance(effect, agent.Start) for effect in node.do(WorkerEnded(JOB, Fence(1), 0, HELD)))


@pytest.mark.parametrize(
    "event",
    [
        WorkerReady(JOB, Fence(9), 0),
        WorkerProgressed(JOB, Fence(9), 0, 1),
        WorkerEnded(JOB, Fence(9), 0, DONE),
        Acknowledged(JOB, Fence(9), 0),
        Acknowledged(JOB, Fence(1), 0),
    ],
    ids=lambda event: f"{type(event).__name__}-{event.fence}",
)
def test_word_about_a_lease_that_is_not_there_changes_nothing(event: agent.Event) -> None:
    node = Node()
    node.works()
    before = node.state
    assert node.do(event) == ()
    assert node.state is before


# ---- several ranks of one job: a node has one per granted GPU


def stopped(effects: tuple[agent.Effect, ...]) -> list[tuple[int, int, str]]:
    return [(each.fence, each.rank, each.mode.value) for each in effects if isinstance(each, agent.StopWorker)]


def started(effects: tuple[agent.Effect, ...]) -> list[tuple[int, int]]:
    return [(each.task.fence, each.task.rank) for each in effects if isinstance(each, agent.Start)]


def test_ranks_of_one_group_work_side_by_side_and_are_reported_apart() -> None:
    node = Node()
    node.works(rank=1)
    assert started(node.offer(rank=3)) == [(1, 3)]
    assert node.offer(rank=3) == ()
    assert node.state.activity == (Activity.BUSY, "works on j-1")
    assert {(lease.rank, lease.state) for lease in node.state.leases()} == {
        (1, AttemptState.RUNNING),
        (3, AttemptState.ACCEPTED),
    }
    (report,) = node.do(WorkerReady(JOB, Fence(1), 3))
    assert report == agent.Report(JOB, Fence(1), 3, AttemptState.READY)
    node.do(WorkerEnded(JOB, Fence(1), 1, DONE))
    node.do(Acknowledged(JOB, Fence(1), 1))
    assert [lease.rank for lease in node.state.leases()] == [3]
    assert node.state.activity == (Activity.BUSY, "works on j-1")
    node.do(WorkerEnded(JOB, Fence(1), 3, DONE))
    assert node.state.activity == (Activity.IDLE, "")


def test_one_stop_reaches_every_rank_of_its_fence_and_those_still_on_their_way() -> None:
    node = Node()
    node.works(rank=0)
    node.works(rank=1)
    stop = StopAsked(JOB, Fence(1), StopMode.HOLD, "a peer was lost")
    assert stopped(node.do(stop)) == [(1, 0, "hold"), (1, 1, "hold")]
    assert node.do(stop) == ()
    assert reports(node.offer(rank=2)) == [(1, "FAILED")]


def test_a_rank_is_not_begun_when_another_of_its_group_has_ended_here() -> None:
    """Nor begun twice: an offer that is delivered late finds a lease that was forgotten."""
    node = Node()
    node.works(rank=0)
    node.do(WorkerEnded(JOB, Fence(1), 0, HELD))
    node.do(Acknowledged(JOB, Fence(1), 0))
    assert reports(node.offer(rank=1)) == [(1, "FAILED")]
    assert reports(node.offer(rank=0)) == [(1, "FAILED")]


def test_the_next_group_starts_whole_when_the_last_worker_of_the_one_before_has_ended() -> None:
    node = Node()
    node.works(rank=0)
    node.works(rank=1)
    assert stopped(node.offer(fence=2, rank=0)) == [(1, 0, "hold"), (1, 1, "hold")]
    assert stopped(node.offer(fence=2, rank=1)) == []  # they know
    assert started(node.do(WorkerEnded(JOB, Fence(1), 1, HELD))) == []
    assert started(node.do(WorkerEnded(JOB, Fence(1), 0, HELD))) == [(2, 0), (2, 1)]


def test_a_whole_group_that_waits_is_replaced_by_the_next_and_its_late_ranks_are_refused() -> None:
    node = Node()
    node.works(rank=0)
    node.offer(fence=2, rank=0)
    node.offer(fence=2, rank=1)
    assert reports(node.offer(fence=3, rank=1)) == [(3, "ACCEPTED"), (2, "FAILED"), (2, "FAILED")]
    assert reports(node.offer(fence=2, rank=2)) == [(2, "FAILED")]
    assert started(node.do(WorkerEnded(JOB, Fence(1), 0, HELD))) == [(3, 1)]
    assert started(node.offer(fence=3, rank=0)) == [(3, 0)]


def test_a_new_group_does_not_soften_a_stop_that_was_asked_before() -> None:
    node = Node()
    node.works()
    node.do(StopAsked(JOB, Fence(1), StopMode.CANCEL, "cancelled"))
    assert stopped(node.offer(fence=2)) == []


class Leases(RuleBasedStateMachine):
    """Offers, stops, workers and the owner in any order: a worker per rank, all of one fence, one last report each."""

    jobs = st.sampled_from([JOB, OTHER])
    fences = st.integers(1, 5).map(Fence)
    ranks = st.integers(0, 2)

    def __init__(self) -> None:
        super().__init__()
        self.node = Node()
        self.running: set[agent.Key] = set()
        self.ended: Counter[agent.Key] = Counter()
        self.offered: set[agent.Key] = set()
        self.reported: dict[agent.Key, AttemptState] = {}
        self.highest: dict[JobId, int] = {}
        self.stopped: set[tuple[JobId, Fence]] = set()

    def happen(self, event: agent.Event) -> None:
        for effect in self.node.do(event):
            match effect:
                case agent.Start(task):
                    key = agent.key_of(task)
                    assert key not in self.running, "a second worker for one rank"
                    assert {other[:2] for other in self.running} <= {key[:2]}, "two groups at once"
                    assert task.fence >= self.highest.get(task.job_id, 0), "an older group after a newer one"
                    assert key[:2] not in self.stopped, "a group that was stopped"
                    self.highest[task.job_id] = task.fence
                    self.running.add(key)
                case agent.StopWorker(job_id, fence, rank):
                    assert (job_id, fence, rank) in self.running
                case agent.Report(job_id, fence, rank, state, outcome):
                    key = (job_id, fence, rank)
                    before = self.reported.get(key, AttemptState.OFFERED)
                    assert state in ATTEMPT_TRANSITIONS[before], f"{key}: {before} -> {state}"
                    self.reported[key] = state
                    assert (outcome is not None) == (state in (AttemptState.DONE, AttemptState.FAILED))
                    self.ended[key] += outcome is not None

    @rule(job_id=jobs, fence=fences, rank=ranks)
    def offer(self, job_id: JobId, fence: Fence, rank: int) -> None:
        """The coordinator never offers again what this node has reported as ended."""
        if self.ended[job_id, fence, rank] == 0:
            self.offered.add((job_id, fence, rank))
            self.happen(Offered(task(job_id, fence, rank)))

    @rule(job_id=jobs, fence=fences, mode=st.sampled_from(StopMode))
    def stop(self, job_id: JobId, fence: Fence, mode: StopMode) -> None:
        self.stopped.add((job_id, fence))
        self.happen(StopAsked(job_id, fence, mode, "stop"))

    @rule(job_id=jobs, fence=fences, rank=ranks)
    def ready(self, job_id: JobId, fence: Fence, rank: int) -> None:
        self.happen(WorkerReady(job_id, fence, rank))

    @rule(job_id=jobs, fence=fences, rank=ranks, step=st.integers(1, 9))
    def progress(self, job_id: JobId, fence: Fence, rank: int, step: int) -> None:
        self.happen(WorkerProgressed(job_id, fence, rank, step))

    @rule(outcome=st.sampled_from([DONE, HELD]), rank=ranks)
    def end(self, outcome: Outcome, rank: int) -> None:
        for key in [key for key in self.running if key[2] == rank]:
            self.running.discard(key)
            self.happen(WorkerEnded(*key, outcome))

    @rule(job_id=jobs, fence=fences, rank=ranks)
    def acknowledge(self, job_id: JobId, fence: Fence, rank: int) -> None:
        if self.ended[job_id, fence, rank]:
            self.happen(Acknowledged(job_id, fence, rank))

    @rule(action=st.sampled_from(["pause", "drain", "resume"]))
    def own(self, action: str) -> None:
        self.happen(OwnerAsked(action, "the owner"))

    @invariant()
    def a_lease_ends_at_most_once(self) -> None:
        assert all(count <= 1 for count in self.ended.values()), self.ended

    @invariant()
    def what_works_has_a_worker_and_the_other_way_round(self) -> None:
        working = {key for key, work in self.node.state.works.items() if work.phase is Phase.WORKING}
        assert working == self.running
        waiting = {key[:2] for key, work in self.node.state.works.items() if work.phase is Phase.WAITING}
        assert len(waiting) <= 1, "two groups wait"
        assert not waiting or self.running
        assert all(job_id == other[0] and fence > other[1] for job_id, fence in waiting for other in self.running)

    @invariant()
    def busy_is_said_when_busy(self) -> None:
        activity, reason = self.node.state.activity
        assert (activity is Activity.IDLE) <= (not self.running)
        assert (activity is Activity.IDLE) == (reason == "")

    def teardown(self) -> None:
        """Every offer that was taken has its one last report once the workers have ended."""
        for rank in (0, 1, 2) * 3:
            self.end(HELD, rank)
        assert not self.running
        assert {key for key, count in self.ended.items() if count} == self.offered


TestLeases = Leases.TestCase
TestLeases.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
