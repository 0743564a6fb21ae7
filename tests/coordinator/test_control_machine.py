"""State machines: whatever happens in whatever order, jobs, attempts and nodes move only along their tables."""

from __future__ import annotations

import pytest
from control_bench import PEER_LOST, TIMING, USER_CODE, Bench
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from coordinator.control import events as e
from coordinator.control.state import JobView, NodeStatus, State
from coordinator.control.transitions import to
from protos.errors import Conflict, NotFound
from protos.ids import Fence, JobId, NodeId
from protos.states import (
    ACTIVE_JOB_STATES,
    ATTEMPT_TRANSITIONS,
    JOB_TRANSITIONS,
    NODE_TRANSITIONS,
    TERMINAL_ATTEMPT_STATES,
    TERMINAL_JOB_STATES,
    Activity,
    AttemptState,
    JobState,
    NodeLink,
    diagram,
)
from protos.work import HeldLease, Outcome

NODES = [NodeId(name) for name in "abcd"]
JOBS = [JobId(f"j-{i}") for i in range(3)]
nodes = st.sampled_from(NODES)
jobs = st.sampled_from(JOBS)
fences = st.integers(0, 4).map(Fence)
ranks = st.integers(0, 2)
faults = st.sampled_from([PEER_LOST, PEER_LOST, USER_CODE, None])
outcomes = st.builds(
    lambda state, step, held, fault: Outcome(
        state,
        step,
        step * 32,
        fault=fault if state is AttemptState.FAILED else None,
        held_step=step if held else None,
    ),
    st.sampled_from([AttemptState.DONE, AttemptState.FAILED]),
    st.integers(0, 20),
    st.booleans(),
    faults,
)


def moved_along(before: State, after: State) -> None:
    """What a step may do to jobs, attempts and nodes."""
    for job_id, job in after.jobs.items():
        old = before.jobs.get(job_id)
        if old is None:
            continue
        state = old.state
        for entered in job.trail[len(old.trail) :]:
            assert entered.state in JOB_TRANSITIONS[state], f"{state} -> {entered.state}"
            state = entered.state
        assert state is job.state
        if old.ended:
            assert job is old
        assert job.fence >= old.fence
        assert job.step >= old.step
        for attempt in job.attempts:
            was = next((a for a in old.attempts if a.rank == attempt.rank), None)
            if was is not None and job.fence == old.fence:
                assert attempt.node_id == was.node_id
                assert attempt.state is was.state or attempt.state in ATTEMPT_TRANSITIONS[was.state]
    for node_id, node in after.nodes.items():
        link = before.nodes[node_id].link if node_id in before.nodes else NodeLink.JOINING
        assert node.link is link or node.link in NODE_TRANSITIONS[link], f"{node_id}: {link} -> {node.link}"


class Life(RuleBasedStateMachine):
    """Reports come from anywhere, under any fence, in any order; users and machines do as they please."""

    submitted: Bundle[JobId] = Bundle("submitted")

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(size=2, sizes={JOBS[1]: 1, JOBS[2]: 3})

    def happen(self, event: e.Event) -> None:
        before = self.bench.state
        try:
            effects = self.bench.do(event)
        except (Conflict, NotFound) as error:
            assert isinstance(event, (e.UserAsked, e.NodeControlled)), f"{event} raised {error}"
            assert self.bench.state is before
            return
        moved_along(before, self.bench.state)
        self.check_effects(effects)

    def check_effects(self, effects: tuple[e.Effect, ...]) -> None:
        for effect in effects:
            job = self.bench.state.jobs.get(effect.job_id)
            match effect:
                case e.Offer(node_id, _, fence, rank):
                    assert job is not None
                    assert (fence, job.state) == (job.fence, JobState.STARTING)
                    assert any(a.rank == rank and a.node_id == node_id for a in job.working)
                    assert self.bench.state.nodes[node_id].link is NodeLink.CONNECTED
                case e.Finish():
                    assert job is not None
                    assert job.ended
                case e.CloseRendezvous(_, fence):
                    assert job is not None
                    assert job.ended or fence < job.fence or not job.working

    @rule(target=submitted, job_id=jobs)
    def submit(self, job_id: JobId) -> JobId:
        if job_id not in self.bench.state.jobs:
            self.bench.jobs += 1
            self.happen(e.Submitted(job_id, self.bench.jobs))
        return job_id

    @rule(job_id=submitted)
    def identify(self, job_id: JobId) -> None:
        self.happen(e.Identified(job_id))

    @rule(job_id=jobs)
    def delay(self, job_id: JobId) -> None:
        self.happen(e.IdentificationDelayed(job_id, "no node"))

    @rule(node=nodes, activity=st.sampled_from(Activity), data=st.data())
    def connect(self, node: NodeId, activity: Activity, data: st.DataObject) -> None:
        mine = [
            HeldLease(job.job_id, job.fence, a.rank, a.state)
            for job in self.bench.state.jobs.values()
            for a in job.working
            if a.node_id == node
        ]
        strange = st.builds(HeldLease, jobs, fences, ranks, st.sampled_from(AttemptState))
        leases = data.draw(st.lists(st.one_of(*map(st.just, mine), strange), max_size=3))
        self.happen(e.NodeConnected(node, node, activity, "", tuple(leases)))

    @rule(node=nodes, activity=st.none() | st.sampled_from(Activity))
    def hear(self, node: NodeId, activity: Activity | None) -> None:
        if self.bench.state.nodes.get(node, NodeStatus(node, node, NodeLink.LEFT)).link is not NodeLink.LEFT:
            self.happen(e.NodeHeard(node, activity))

    @rule(node=nodes)
    def disconnect(self, node: NodeId) -> None:
        self.happen(e.NodeDisconnected(node))

    @rule(node=nodes, for_good=st.booleans())
    def leave(self, node: NodeId, for_good: bool) -> None:
        self.happen(e.NodeLeft(node, for_good, "left"))

    @rule(node=nodes, action=st.sampled_from(["cordon", "uncordon", "drain", "remove"]))
    def control(self, node: NodeId, action: str) -> None:
        self.happen(e.NodeControlled(node, action))

    @rule(job_id=submitted, state=st.sampled_from(AttemptState), outcome=outcomes, data=st.data())
    def report(self, job_id: JobId, state: AttemptState, outcome: Outcome, data: st.DataObject) -> None:
        """Mostly of an attempt that exists."""
        working = self.bench.state.jobs[job_id].attempts
        if working and data.draw(st.integers(0, 4)):
            attempt = data.draw(st.sampled_from(working))
            node, rank, fence = attempt.node_id, attempt.rank, self.bench.state.jobs[job_id].fence
        else:
            node, rank, fence = data.draw(nodes), data.draw(ranks), data.draw(fences)
        ends = state in (AttemptState.DONE, AttemptState.FAILED)
        said = outcome if ends and outcome.state is state else None
        self.happen(e.AttemptReported(node, job_id, fence, rank, state, said))

    @rule(job_id=submitted, data=st.data())
    def all_get_ready(self, job_id: JobId, data: st.DataObject) -> None:
        for attempt in self.bench.state.jobs[job_id].working:
            fence = self.bench.state.jobs[job_id].fence
            self.happen(e.AttemptReported(attempt.node_id, job_id, fence, attempt.rank, AttemptState.READY))

    @rule(job_id=submitted, fence=fences, step=st.integers(0, 30))
    def progress(self, job_id: JobId, fence: Fence, step: int) -> None:
        self.happen(e.Progressed(NODES[0], job_id, fence, step, step * 32))

    @rule(job_id=submitted, action=st.sampled_from(["cancel", "pause", "resume"]))
    def ask(self, job_id: JobId, action: str) -> None:
        self.happen(e.UserAsked(job_id, action))

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 8.0, 25.0, 130.0]))
    def tick(self, seconds: float) -> None:
        self.bench.now_s += seconds
        self.happen(e.Ticked())

    @invariant()
    def no_node_has_two_unfinished_attempts(self) -> None:
        seen: list[NodeId] = [a.node_id for job in self.bench.state.jobs.values() for a in job.working]
        assert len(seen) == len(set(seen))

    @invariant()
    def unfinished_attempts_belong_to_active_jobs(self) -> None:
        for job in self.bench.state.jobs.values():
            if job.working and not job.ended:
                assert job.state in ACTIVE_JOB_STATES
            if job.state in (JobState.STARTING, JobState.RUNNING, JobState.RECOVERING, JobState.STOPPING):
                assert job.working, f"{job.state} and nobody works: it would wait for ever"

    @invariant()
    def every_waiting_job_says_why(self) -> None:
        for job in self.bench.state.jobs.values():
            if job.ended or job.state in (JobState.RECOVERING, JobState.PAUSED, JobState.STARTING):
                assert job.message

    @invariant()
    def what_is_bounded_has_a_deadline(self) -> None:
        for job in self.bench.state.jobs.values():
            if job.state in (JobState.STARTING, JobState.RECOVERING, JobState.STOPPING) or job.wanted:
                assert job.deadline_s is not None, f"{job.state}, wanted {job.wanted}"

    def teardown(self) -> None:
        """Once everything is quiet and the nodes do as they are told, every job ends or waits for a person or nodes."""
        bench = self.bench
        for node in NODES:
            self.happen(e.NodeConnected(node, node, Activity.IDLE, "", ()))
            self.happen(e.NodeControlled(node, "uncordon"))
        for _ in range(400):
            bench.now_s += 1.0
            for node in NODES:
                self.happen(e.NodeHeard(node, Activity.IDLE))
            for job in list(bench.state.jobs.values()):
                if job.state is JobState.PLANNING:
                    self.happen(e.Identified(job.job_id))
                for attempt in job.working if not job.ended else ():
                    holds = job.wanted or job.state is JobState.RECOVERING
                    state = AttemptState.FAILED if holds else AttemptState.DONE
                    outcome = Outcome(state, 40, 40 * 32, fault=PEER_LOST if holds else None)
                    self.happen(e.AttemptReported(attempt.node_id, job.job_id, job.fence, attempt.rank, state, outcome))
            self.happen(e.Ticked())
            if all(job.ended or job.state is JobState.PAUSED for job in bench.state.jobs.values()):
                return
        left = [(job.job_id, job.state, job.reason) for job in bench.state.jobs.values() if not job.ended]
        raise AssertionError(f"never ended: {left}")


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


# ---- the tables


@pytest.mark.parametrize(
    ("table", "states"),
    [(JOB_TRANSITIONS, JobState), (ATTEMPT_TRANSITIONS, AttemptState), (NODE_TRANSITIONS, NodeLink)],
    ids=["job", "attempt", "node"],
)
def test_a_transition_table_is_total_and_closed(table, states) -> None:  # type: ignore[no-untyped-def]
    assert set(table) == set(states)
    for before, after in table.items():
        assert after <= set(states)
        assert before not in after


def test_attempts_only_move_forward() -> None:
    order = list(AttemptState)
    for before, after in ATTEMPT_TRANSITIONS.items():
        assert all(order.index(state) > order.index(before) for state in after)


def test_every_job_state_can_be_reached_and_left_for_an_end() -> None:
    reached, waiting = set(), [JobState.SUBMITTED]
    while waiting:
        state = waiting.pop()
        reached.add(state)
        waiting += JOB_TRANSITIONS[state] - reached
    assert reached == set(JobState)
    assert {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED} == TERMINAL_JOB_STATES
    assert {AttemptState.DONE, AttemptState.FAILED, AttemptState.LOST} == TERMINAL_ATTEMPT_STATES


@pytest.mark.parametrize("before", JobState)
@pytest.mark.parametrize("after", JobState)
def test_a_job_moves_only_along_the_table(before: JobState, after: JobState) -> None:
    job = JobView(JOBS[0], 1, state=before)
    if after is before or after in JOB_TRANSITIONS[before]:
        assert to(job, after).state is after
    else:
        with pytest.raises(Conflict):
            to(job, after)


def test_the_diagram_shows_every_transition() -> None:
    text = diagram()
    for table in (JOB_TRANSITIONS, ATTEMPT_TRANSITIONS, NODE_TRANSITIONS):
        for before, after in table.items():
            for state in after:
                assert f"{before} --> {state}" in text


def test_the_bounds_are_in_the_order_that_makes_them_useful() -> None:
    assert TIMING.cut_off_grace_s < TIMING.lease_ttl_s < TIMING.hold_s < TIMING.start_s
    assert [TIMING.backoff_s(n) for n in range(4)] == [1.0, 2.0, 4.0, 8.0]
