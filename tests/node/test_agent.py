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

    def offer(self, job_id: JobId = JOB, fence: int = 1) -> tuple[agent.Effect, ...]:
        return self.do(Offered(task(job_id, fence)))

    def works(self, job_id: JobId = JOB, fence: int = 1) -> None:
        self.offer(job_id, fence)
        self.do(WorkerReady(job_id, Fence(fence)))
        self.do(WorkerProgressed(job_id, Fence(fence), 3))

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
    assert reports(node.do(WorkerReady(JOB, Fence(1)))) == [(1, "READY")]
    assert reports(node.do(WorkerProgressed(JOB, Fence(1), 1))) == [(1, "RUNNING")]
    assert reports(node.do(WorkerProgressed(JOB, Fence(1), 2))) == []
    assert reports(node.do(WorkerEnded(JOB, Fence(1), DONE))) == [(1, "DONE")]
    assert node.state.activity == (Activity.IDLE, "")
    assert node.lease().state is AttemptState.DONE  # presented until the coordinator has it
    assert node.do(Acknowledged(JOB, Fence(1))) == ()
    assert node.state.leases() == ()


def test_an_offer_that_comes_twice_starts_one_worker() -> None:
    node = Node()
    node.offer()
    assert node.offer() == ()


def test_the_next_group_starts_when_the_last_worker_has_ended() -> None:
    node = Node()
    node.works()
    effects = node.offer(fence=2)
    assert agent.StopWorker(JOB, Fence(1), StopMode.HOLD, "a new group is forming") in effects
    assert not any(isinstance(effect, agent.Start) for effect in effects)
    effects = node.do(WorkerEnded(JOB, Fence(1), HELD))
    assert reports(effects) == [(1, "FAILED")]
    assert effects[-1] == agent.Start(task(fence=2))


def test_a_group_that_still_waits_is_replaced_by_the_next() -> None:
    node = Node()
    node.works()
    node.offer(fence=2)
    effects = node.offer(fence=3)
    assert (2, "FAILED") in reports(effects)
    assert node.do(WorkerEnded(JOB, Fence(1), HELD))[-1] == agent.Start(task(fence=3))


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
        agent.StopWorker(JOB, Fence(1), StopMode.HOLD, "peer lost"),
    )
    assert node.do(StopAsked(JOB, Fence(1), StopMode.HOLD, "again")) == ()
    assert len(node.do(StopAsked(JOB, Fence(1), StopMode.CANCEL, "cancelled"))) == 1
    assert node.do(StopAsked(JOB, Fence(1), StopMode.HOLD, "too mild")) == ()
    assert reports(node.do(WorkerEnded(JOB, Fence(1), HELD))) == [(1, "FAILED")]


def test_a_stop_of_a_group_that_waits_ends_it_without_a_worker() -> None:
    node = Node()
    node.works()
    node.offer(fence=2)
    assert reports(node.do(StopAsked(JOB, Fence(2), StopMode.HOLD, "dissolved"))) == [(2, "FAILED")]
    assert reports(node.do(WorkerEnded(JOB, Fence(1), HELD))) == [(1, "FAILED")]
    assert node.state.activity[0] is Activity.IDLE


@pytest.mark.parametrize("action", ["pause", "drain"])
def test_the_owner_gets_the_machine_back(action: str) -> None:
    node = Node()
    node.works()
    assert node.do(OwnerAsked(action, "a game")) == (agent.StopWorker(JOB, Fence(1), StopMode.PAUSE, "a game"),)
    assert node.state.activity == (Activity.PAUSED, "a game")
    assert reports(node.offer(OTHER)) == [(1, "FAILED")]
    node.do(WorkerEnded(JOB, Fence(1), HELD))
    node.do(OwnerAsked("resume", ""))
    assert node.state.activity == (Activity.IDLE, "")
    assert reports(node.offer(OTHER, fence=2)) == [(2, "ACCEPTED")]


def test_a_pause_also_ends_what_only_waits() -> None:
    node = Node()
    node.works()
    node.offer(fence=2)
    effects = node.do(OwnerAsked("pause", "a game"))
    assert reports(effects) == [(2, "FAILED")]
    assert not any(isinstance(effect, agent.Start) for effect in node.do(WorkerEnded(JOB, Fence(1), HELD)))


@pytest.mark.parametrize(
    "event",
    [
        WorkerReady(JOB, Fence(9)),
        WorkerProgressed(JOB, Fence(9), 1),
        WorkerEnded(JOB, Fence(9), DONE),
        Acknowledged(JOB, Fence(9)),
        Acknowledged(JOB, Fence(1)),
    ],
    ids=lambda event: f"{type(event).__name__}-{event.fence}",
)
def test_word_about_a_lease_that_is_not_there_changes_nothing(event: agent.Event) -> None:
    node = Node()
    node.works()
    before = node.state
    assert node.do(event) == ()
    assert node.state is before


class Leases(RuleBasedStateMachine):
    """Offers, stops, workers and the owner in any order: one worker at a time, one last report per lease."""

    jobs = st.sampled_from([JOB, OTHER])
    fences = st.integers(1, 5).map(Fence)

    def __init__(self) -> None:
        super().__init__()
        self.node = Node()
        self.running: set[tuple[JobId, Fence]] = set()
        self.ended: Counter[tuple[JobId, Fence]] = Counter()
        self.offered: set[tuple[JobId, Fence]] = set()
        self.reported: dict[tuple[JobId, Fence], AttemptState] = {}
        self.highest: dict[JobId, int] = {}

    def happen(self, event: agent.Event) -> None:
        for effect in self.node.do(event):
            match effect:
                case agent.Start(started):
                    assert not self.running, "a second worker beside the first"
                    assert started.fence >= self.highest.get(started.job_id, 0), "an older group after a newer one"
                    self.highest[started.job_id] = started.fence
                    self.running.add((started.job_id, started.fence))
                case agent.StopWorker(job_id, fence):
                    assert (job_id, fence) in self.running
                case agent.Report(job_id, fence, _, state, outcome):
                    key = (job_id, fence)
                    before = self.reported.get(key, AttemptState.OFFERED)
                    assert state in ATTEMPT_TRANSITIONS[before], f"{key}: {before} -> {state}"
                    self.reported[key] = state
                    assert (outcome is not None) == (state in (AttemptState.DONE, AttemptState.FAILED))
                    self.ended[key] += outcome is not None

    @rule(job_id=jobs, fence=fences)
    def offer(self, job_id: JobId, fence: Fence) -> None:
        """The coordinator never offers again what this node has reported as ended."""
        if self.ended[job_id, fence] == 0:
            self.offered.add((job_id, fence))
            self.happen(Offered(task(job_id, fence)))

    @rule(job_id=jobs, fence=fences, mode=st.sampled_from(StopMode))
    def stop(self, job_id: JobId, fence: Fence, mode: StopMode) -> None:
        self.happen(StopAsked(job_id, fence, mode, "stop"))

    @rule(job_id=jobs, fence=fences)
    def ready(self, job_id: JobId, fence: Fence) -> None:
        self.happen(WorkerReady(job_id, fence))

    @rule(job_id=jobs, fence=fences, step=st.integers(1, 9))
    def progress(self, job_id: JobId, fence: Fence, step: int) -> None:
        self.happen(WorkerProgressed(job_id, fence, step))

    @rule(outcome=st.sampled_from([DONE, HELD]))
    def end(self, outcome: Outcome) -> None:
        for key in list(self.running):
            self.running.discard(key)
            self.happen(WorkerEnded(*key, outcome))

    @rule(job_id=jobs, fence=fences)
    def acknowledge(self, job_id: JobId, fence: Fence) -> None:
        if self.ended[job_id, fence]:
            self.happen(Acknowledged(job_id, fence))

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
        waiting = [work for work in self.node.state.works.values() if work.phase is Phase.WAITING]
        assert len(waiting) <= 1
        assert not waiting or self.running

    @invariant()
    def busy_is_said_when_busy(self) -> None:
        activity, reason = self.node.state.activity
        assert (activity is Activity.IDLE) <= (not self.running)
        assert (activity is Activity.IDLE) == (reason == "")

    def teardown(self) -> None:
        """Every offer that was taken has its one last report once the workers have ended."""
        for _ in range(3):
            self.end(HELD)
        assert not self.running
        assert {key for key, count in self.ended.items() if count} == self.offered


TestLeases = Leases.TestCase
TestLeases.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
