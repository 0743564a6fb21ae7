"""What people ask of jobs and nodes in every state, identification, who runs next: scenarios of the control loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from control_bench import TIMING, USER_CODE, Bench, stops

from coordinator.control import events as e
from protos.errors import Blame, Conflict, NotFound
from protos.ids import Fence, JobId, NodeId
from protos.plan import Layout, Plan
from protos.states import Activity, AttemptState, Eligibility, JobState, NodeLink, Reason
from protos.work import Outcome

JOB = JobId("j-1")


# ---- the user's word in every state


def in_state(state: JobState) -> Bench:
    bench = Bench(size=2)
    if state is JobState.PLANNING:
        bench.do(e.Submitted(JOB, 1))
        return bench
    if state is JobState.QUEUED:
        bench.submit()
        return bench
    bench.connect("a", "b")
    bench.submit()
    if state is JobState.STARTING:
        return bench
    bench.ready()
    match state:
        case JobState.RECOVERING:
            bench.fail(1, held=2)
        case JobState.STOPPING:
            bench.do(e.UserAsked(JOB, "cancel"))
        case JobState.PAUSED:
            bench.do(e.UserAsked(JOB, "pause"))
            bench.fail(0, held=2)
            bench.fail(1, held=2)
        case JobState.SUCCEEDED:
            bench.finish(0)
            bench.finish(1)
        case JobState.FAILED:
            bench.fail(0, fault=USER_CODE)
        case JobState.CANCELLED:
            bench.do(e.UserAsked(JOB, "cancel"))
            bench.fail(0)
            bench.fail(1)
    assert bench.job().state is state
    return bench


def let_go(bench: Bench) -> None:
    """Whoever still works ends as it was told."""
    for attempt in bench.job().working:
        bench.fail(attempt.rank, held=2)


ACTIVE = [JobState.STARTING, JobState.RUNNING, JobState.RECOVERING]
ENDED = [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED]


@pytest.mark.parametrize("state", [JobState.PLANNING, JobState.QUEUED, JobState.PAUSED])
def test_cancel_ends_a_job_that_does_not_run_at_once(state: JobState) -> None:
    bench = in_state(state)
    assert bench.do(e.UserAsked(JOB, "cancel")) == (e.Finish(JOB),)
    assert (bench.job().state, bench.job().reason) == (JobState.CANCELLED, Reason.CANCELLED_BY_USER)


@pytest.mark.parametrize("state", ACTIVE)
def test_cancel_stops_what_runs_first(state: JobState) -> None:
    bench = in_state(state)
    working = [a.node_id for a in bench.job().working]
    assert stops(bench.do(e.UserAsked(JOB, "cancel"))) == [(node, 1, "cancel") for node in working]
    assert bench.job().state is JobState.STOPPING
    assert bench.do(e.UserAsked(JOB, "cancel")) == ()
    let_go(bench)
    assert bench.job().state is JobState.CANCELLED


@pytest.mark.parametrize("state", [JobState.PLANNING, JobState.QUEUED])
def test_pause_before_a_job_runs_holds_it_back(state: JobState) -> None:
    bench = in_state(state)
    bench.do(e.UserAsked(JOB, "pause"))
    bench.connect("a", "b")
    assert bench.job().state is JobState.PAUSED
    bench.do(e.UserAsked(JOB, "resume"))
    assert bench.job().state is (JobState.PLANNING if state is JobState.PLANNING else JobState.STARTING)


@pytest.mark.parametrize("state", ACTIVE)
def test_pause_keeps_the_state_and_resume_goes_on_under_the_next_fence(state: JobState) -> None:
    bench = in_state(state)
    bench.do(e.UserAsked(JOB, "pause"))
    with pytest.raises(Conflict):
        bench.do(e.UserAsked(JOB, "resume"))
    with pytest.raises(Conflict):
        bench.do(e.UserAsked(JOB, "pause"))
    let_go(bench)
    assert (bench.job().state, bench.job().wanted) == (JobState.PAUSED, None)
    bench.do(e.UserAsked(JOB, "resume"))
    assert (bench.job().state, bench.job().fence) == (JobState.STARTING, 2)
    assert set(bench.holders) <= {"a", "b"}


def test_a_pause_while_the_group_forms_stays_the_reason_when_it_then_runs() -> None:
    """A coordinator that restarts finds the request only in the reason."""
    bench = in_state(JobState.STARTING)
    bench.do(e.UserAsked(JOB, "pause"))
    bench.ready()
    assert (bench.job().state, bench.job().reason) == (JobState.RUNNING, Reason.PAUSED_BY_USER)
    assert bench.job().deadline_s is not None


def test_cancel_wins_over_a_pause_under_way() -> None:
    bench = in_state(JobState.RUNNING)
    bench.do(e.UserAsked(JOB, "pause"))
    bench.do(e.UserAsked(JOB, "cancel"))
    let_go(bench)
    assert bench.job().state is JobState.CANCELLED


@pytest.mark.parametrize("state", [JobState.STOPPING, JobState.PAUSED, *ENDED])
def test_pause_is_refused_where_it_makes_no_sense(state: JobState) -> None:
    bench = in_state(state)
    before = bench.state
    with pytest.raises(Conflict):
        bench.do(e.UserAsked(JOB, "pause"))
    assert bench.state == before


@pytest.mark.parametrize("state", [state for state in JobState if state not in (JobState.PAUSED, JobState.SUBMITTED)])
def test_resume_is_refused_unless_paused(state: JobState) -> None:
    with pytest.raises(Conflict):
        in_state(state).do(e.UserAsked(JOB, "resume"))


@pytest.mark.parametrize("state", ENDED)
def test_a_job_that_has_ended_cannot_be_cancelled(state: JobState) -> None:
    with pytest.raises(Conflict):
        in_state(state).do(e.UserAsked(JOB, "cancel"))


def test_words_nobody_knows_are_refused() -> None:
    bench = in_state(JobState.RUNNING)
    with pytest.raises(Conflict, match="unknown action"):
        bench.do(e.UserAsked(JOB, "explode"))
    with pytest.raises(Conflict, match="unknown action"):
        bench.do(e.NodeControlled(NodeId("a"), "explode"))
    with pytest.raises(NotFound):
        bench.do(e.NodeControlled(NodeId("z"), "drain"))


@pytest.mark.parametrize("state", ENDED)
@pytest.mark.parametrize(
    "event",
    [
        e.Identified(JOB),
        e.Refused(JOB, Reason.MODEL_UNUSABLE, Blame.USER_CODE, "no", "no"),
        e.IdentificationDelayed(JOB, "later"),
        e.AttemptReported(NodeId("a"), JOB, Fence(1), 0, AttemptState.FAILED, Outcome(AttemptState.FAILED)),
        e.Progressed(NodeId("a"), JOB, Fence(1), 500, 500),
        e.NodeLeft(NodeId("a"), True, "gone"),
        e.Ticked(),
    ],
    ids=lambda event: type(event).__name__,
)
def test_nothing_changes_a_job_that_has_ended(state: JobState, event: e.Event) -> None:
    bench = in_state(state)
    before = bench.job()
    bench.now_s += 1000.0
    bench.do(event)
    assert bench.job() is before


@pytest.mark.parametrize(
    "event",
    [
        e.Identified(JOB),
        e.Refused(JOB, Reason.MODEL_UNUSABLE, Blame.USER_CODE, "no", "no"),
        e.IdentificationDelayed(JOB, "later"),
        e.AttemptReported(NodeId("a"), JOB, Fence(1), 0, AttemptState.DONE, Outcome(AttemptState.DONE)),
        e.Progressed(NodeId("a"), JOB, Fence(1), 5, 5),
        e.NodeHeard(NodeId("a")),
        e.NodeDisconnected(NodeId("a")),
        e.NodeLeft(NodeId("a"), True, "gone"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_word_of_a_job_or_node_that_is_forgotten_is_no_error(event: e.Event) -> None:
    bench = Bench()
    assert bench.do(event) == ()
    assert bench.state == Bench().state


# ---- identification


def test_identification_is_asked_again_when_a_node_is_there() -> None:
    bench = Bench(size=1)
    bench.do(e.Submitted(JOB, 1))
    bench.do(e.IdentificationDelayed(JOB, "no node has joined"))
    assert bench.job().reason is Reason.WAITING_FOR_NODES
    assert bench.wait(5.0) == []
    assert bench.connect("a") == [e.Identify(JOB)]
    assert bench.wait(2.0, heard=("a",)) == []


def test_an_identification_whose_answer_was_lost_is_asked_for_again() -> None:
    bench = Bench(size=1)
    bench.connect("a")
    bench.do(e.Submitted(JOB, 1))
    assert bench.wait(TIMING.identify_s - 1.0, heard=("a",), every_s=1.0) == []
    assert bench.wait(2.0, heard=("a",)) == [e.Identify(JOB)]
    bench.do(e.Identified(JOB))
    assert bench.job().state is JobState.STARTING


def test_a_model_that_is_refused_fails_the_job_with_its_reason() -> None:
    bench = Bench()
    bench.do(e.Submitted(JOB, 1))
    bench.do(e.Refused(JOB, Reason.DATA_UNUSABLE, Blame.USER_CODE, "no column y", "name one of: x"))
    job = bench.job()
    assert (job.state, job.reason, job.message, job.hint) == (
        JobState.FAILED, Reason.DATA_UNUSABLE, "no column y", "name one of: x"
    )  # fmt: skip


def test_a_job_paused_while_it_is_identified_keeps_what_was_found() -> None:
    bench = Bench(size=1)
    bench.connect("a")
    bench.do(e.Submitted(JOB, 1))
    bench.do(e.UserAsked(JOB, "pause"))
    bench.do(e.Identified(JOB))
    assert bench.job().state is JobState.PAUSED
    bench.do(e.UserAsked(JOB, "resume"))
    assert bench.job().state is JobState.STARTING


# ---- members


class Parts(Bench):
    """Of jobs whose ranks hold parts of the model."""

    def plan_of(self, nodes: Sequence[NodeId], idle: tuple[NodeId, ...]) -> Plan:
        stages = tuple((s, s + 1) for s in range(len(nodes)))
        return replace(super().plan_of(nodes, idle), layout=Layout(stages, tuple("x" * (len(nodes) - 1))))


def test_a_drained_node_hands_over_and_takes_no_more_work() -> None:
    """`pause` is what uploads before the attempt ends; the other rank has the same state on its disk."""
    bench = Bench()
    bench.running("a", "b")
    bench.connect("c")
    assert stops(bench.do(e.NodeControlled(NodeId("b"), "drain"))) == [("a", 1, "hold"), ("b", 1, "pause")]
    assert (bench.job().state, bench.job().reason) == (JobState.RECOVERING, Reason.NODE_LEFT)
    bench.fail(0, held=4)
    bench.wait(TIMING.hand_over_s - 1.0, heard=("a", "b", "c"))
    assert [a.node_id for a in bench.job().working] == ["b"]  # nothing hurries its upload
    bench.fail(1, held=4)
    bench.wait(2.0, heard=("a", "b", "c"))
    assert {a.node_id for a in bench.job().attempts} == {"a", "c"}


def test_the_only_node_of_a_job_hands_over_when_it_is_drained() -> None:
    bench = Bench(size=1)
    bench.running("a")
    assert stops(bench.do(e.NodeControlled(NodeId("a"), "drain"))) == [("a", 1, "pause")]


def test_all_who_hold_parts_hand_over_with_a_drained_node() -> None:
    bench = Parts()
    bench.running("a", "b")
    assert stops(bench.do(e.NodeControlled(NodeId("b"), "drain"))) == [("a", 1, "pause"), ("b", 1, "pause")]


def test_all_who_hold_parts_hand_over_when_an_owner_wants_the_machine_back() -> None:
    bench = Parts()
    bench.running("a", "b")
    bench.do(e.NodeHeard(NodeId("b"), Activity.BUSY, "works on j-1"))
    told = [("a", 1, "pause"), ("b", 1, "pause")]
    assert stops(bench.do(e.NodeHeard(NodeId("b"), Activity.PAUSED, "draining"))) == told
    assert stops(bench.do(e.NodeHeard(NodeId("b"), Activity.PAUSED, "draining on its owner's word"))) == []


def test_a_node_that_is_drained_while_its_group_is_held_still_hands_over() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.fail(0, held=4)
    assert stops(bench.do(e.NodeControlled(NodeId("b"), "drain"))) == [("b", 1, "pause")]
    bench.wait(TIMING.hold_s + 1.0, heard=("a", "b"))
    assert [a.node_id for a in bench.job().working] == ["b"]


@pytest.mark.parametrize("action", ["pause", "cancel"])
def test_a_drain_takes_nothing_back_of_what_its_user_asked(action: str) -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.do(e.UserAsked(JOB, action))
    assert stops(bench.do(e.NodeControlled(NodeId("b"), "drain"))) == []


def test_a_drain_outlives_a_reconnection_until_it_is_taken_back() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.do(e.NodeDisconnected(NodeId("b")))
    assert stops(bench.do(e.NodeControlled(NodeId("b"), "drain"))) == []  # it would hear nothing, and trains on
    assert stops(bench.connect("b", leases=[("j-1", 1, 1)])) == [("a", 1, "hold"), ("b", 1, "pause")]
    assert bench.state.nodes[NodeId("b")].eligibility is Eligibility.DRAINING
    bench.do(e.NodeControlled(NodeId("b"), "uncordon"))
    assert bench.state.nodes[NodeId("b")].willing


def test_a_cordoned_node_finishes_its_work_but_gets_no_more() -> None:
    bench = Bench()
    bench.running("a", "b")
    assert bench.do(e.NodeControlled(NodeId("a"), "cordon")) == ()
    bench.finish(1)
    bench.finish(0)
    assert bench.job().state is JobState.SUCCEEDED
    assert bench.state.idle() == ("b",)


@pytest.mark.parametrize(
    "event",
    [e.NodeLeft(NodeId("b"), False, "stopped by its owner"), e.NodeControlled(NodeId("b"), "remove")],
    ids=["left", "removed"],
)
def test_a_node_that_goes_is_replaced_at_once(event: e.Event) -> None:
    bench = Bench()
    bench.running("a", "b")
    assert stops(bench.do(event)) == [("a", 1, "hold")]
    assert bench.state.nodes[NodeId("b")].link is NodeLink.LEFT
    assert bench.job().reason is Reason.NODE_LEFT


def test_a_node_whose_owner_uses_it_gets_nothing() -> None:
    bench = Bench(size=1)
    bench.connect("a", activity=Activity.PAUSED)
    bench.submit()
    assert bench.job().reason is Reason.WAITING_FOR_NODES
    bench.do(e.NodeHeard(NodeId("a"), Activity.IDLE, ""))
    assert bench.job().state is JobState.STARTING


# ---- who runs next


def test_jobs_start_in_order_of_submission() -> None:
    bench = Bench(size=1)
    for name in ("j-1", "j-2", "j-3"):
        bench.submit(name)
    bench.connect("a")
    states = [bench.job(name).state for name in ("j-1", "j-2", "j-3")]
    assert states == [JobState.STARTING, JobState.QUEUED, JobState.QUEUED]
    bench.ready()
    bench.finish(0)
    assert bench.job("j-2").state is JobState.STARTING
    assert bench.job("j-3").reason is Reason.WAITING_FOR_BUSY_NODES


def test_a_job_that_waits_for_busy_nodes_keeps_its_turn() -> None:
    bench = Bench(sizes={"j-1": 1, "j-2": 2, "j-3": 1})
    bench.connect("a", "b")
    for name in ("j-1", "j-2", "j-3"):
        bench.submit(name)
    assert bench.job("j-2").reason is Reason.WAITING_FOR_BUSY_NODES
    assert bench.job("j-3").state is JobState.QUEUED


def test_a_job_that_waits_for_nodes_that_are_not_there_lets_others_pass() -> None:
    bench = Bench(sizes={"j-1": 5, "j-2": 1})
    bench.connect("a")
    bench.submit("j-1")
    bench.submit("j-2")
    assert bench.job("j-1").reason is Reason.WAITING_FOR_NODES
    assert bench.job("j-2").state is JobState.STARTING


def test_a_group_that_backs_off_does_not_lose_its_nodes_to_a_later_job() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.submit("j-2")
    bench.fail(0)
    bench.fail(1)
    assert bench.job("j-2").state is JobState.QUEUED
    bench.wait(2.0, heard=("a", "b"))
    assert (bench.job("j-1").state, bench.job("j-2").state) == (JobState.STARTING, JobState.QUEUED)


def test_a_node_with_a_worker_that_is_still_ending_gets_no_other_job() -> None:
    bench = Bench(size=1)
    bench.connect("a")
    bench.submit("j-1")
    bench.do(e.NodeHeard(NodeId("a"), Activity.BUSY, "works on j-1"))
    bench.submit("j-2")
    bench.do(e.UserAsked(JOB, "cancel"))
    bench.wait(TIMING.stop_s + 1.0, heard=("a",))
    assert bench.job().state is JobState.CANCELLED
    assert bench.job("j-2").state is JobState.QUEUED
    bench.do(e.NodeHeard(NodeId("a"), Activity.IDLE, ""))
    assert bench.job("j-2").state is JobState.STARTING


def test_a_job_no_cluster_of_these_nodes_can_hold_fails_with_the_reason() -> None:
    bench = Bench(refuse=e.Unplaced("needs 80 GiB, 8 are there", "add a node", True, Reason.NO_PLACEMENT))
    bench.connect("a")
    bench.submit()
    job = bench.job()
    assert (job.state, job.blame, job.hint) == (JobState.FAILED, Blame.POLICY, "add a node")
    assert bench.effects == (e.Finish(JOB),)
