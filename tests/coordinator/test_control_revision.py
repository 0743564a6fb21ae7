"""A running group gives way to another plan, when that still can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from control_bench import PEER_LOST, TIMING, USER_CODE, Bench, plan_on, stops

from coordinator.control import events as e
from coordinator.control.shape import Shape
from protos.errors import Blame
from protos.ids import Fence, JobId, NodeId
from protos.plan import Layout, Plan
from protos.states import Activity, AttemptState, JobState, Reason
from protos.work import Fault

CUT = Layout(((0, 1), (1, 2)), ("a",))


def plan(*nodes: str, **values: object) -> Plan:
    return replace(plan_on([NodeId(node) for node in nodes]), **values)  # type: ignore[arg-type]


def revise(bench: Bench, made: Plan, fence: int = 1) -> Sequence[e.Effect]:
    return bench.do(e.Revised(JobId("j-1"), Fence(fence), made, "c joins the group"))


def running(*nodes: str) -> Bench:
    bench = Bench()
    bench.running(*nodes or ("a", "b"))
    bench.progress(5)
    return bench


def hold(bench: Bench, at: int = 7) -> None:
    for attempt in bench.job().attempts:
        bench.fail(attempt.rank, held=at)


def test_a_newcomer_joins_the_group_from_the_last_committed_step() -> None:
    bench = running()
    bench.connect("c")
    effects = revise(bench, plan("a", "b", "c"))
    assert stops(effects) == [("a", 1, "hold"), ("b", 1, "hold")]
    assert (bench.job().state, bench.job().reason, bench.job().message) == (
        JobState.RECOVERING,
        Reason.REPLANNED,
        "c joins the group",
    )
    hold(bench)
    assert bench.job().state is JobState.STARTING and bench.job().fence == 2  # at once: nothing went wrong
    assert [(node, fence) for node, fence, _ in bench.offers()] == [("a", 2), ("b", 2), ("c", 2)]
    assert bench.job().retries == 0 and bench.job().next_plan is None
    bench.ready()
    assert bench.job().state is JobState.RUNNING


def test_the_plan_is_the_one_that_was_decided_and_what_the_old_group_measured_is_kept() -> None:
    bench = running()
    before, made = bench.job().plan, plan("b", strategy="single_node", trials=("single_node",), trial_steps=30)
    revise(bench, made)
    hold(bench)
    assert bench.job().plan is made
    left = bench.job().left
    assert left is not None and (left.plan, left.fence, left.first_step) == (before, 1, 0)
    assert [attempt.state for attempt in left.attempts] == [AttemptState.FAILED] * 2


def test_revisions_use_up_no_retries() -> None:
    bench = running()
    nodes = ["a", "b"]
    for node in ("c", "d", "e", "f", "g"):
        bench.connect(node)
        nodes.append(node)
        revise(bench, plan(*nodes), int(bench.job().fence))
        hold(bench, bench.job().step)
        bench.ready()
        bench.progress(bench.job().step + 1)
    assert len(bench.job().attempts) == 7 and bench.job().retries == 0


@pytest.mark.parametrize(
    ("layout", "to", "mode"),
    [(None, ("a",), "hold"), (None, ("c",), "pause"), (CUT, ("a", "b"), "pause"), (CUT, ("c",), "pause")],
)
def test_a_state_that_would_be_of_no_use_where_it_lies_is_uploaded(
    layout: Layout | None, to: tuple[str, ...], mode: str
) -> None:
    """Parts, and what no node of the next group has."""
    bench = Bench()
    bench.plan_of = lambda nodes, idle: replace(plan_on(nodes), layout=layout)  # type: ignore[method-assign]
    bench.running("a", "b")
    bench.progress(5)
    bench.connect("c")
    assert {stop[2] for stop in stops(revise(bench, plan(*to)))} == {mode}


@pytest.mark.parametrize(
    "why", ["an older group", "it is being paused", "newcomer paused", "newcomer busy", "a job waits", "one is leaving"]
)
def test_what_does_not_hold_any_more_is_not_done(why: str) -> None:
    bench = running()
    activity = {"newcomer paused": Activity.PAUSED, "newcomer busy": Activity.BUSY}.get(why, Activity.IDLE)
    bench.connect("c", activity=activity)
    if why == "it is being paused":
        bench.do(e.UserAsked(JobId("j-1"), "pause"))
    if why == "a job waits":
        bench.sizes["j-2"] = 4
        bench.submit("j-2")
    if why == "one is leaving":
        bench.do(e.NodeControlled(NodeId("b"), "cordon"))
    before = bench.job()
    assert not stops(revise(bench, plan("a", "b", "c"), 9 if why == "an older group" else 1))
    assert bench.job() == before


def test_a_plan_without_newcomers_does_not_wait_for_other_jobs() -> None:
    bench = running()
    bench.sizes["j-2"] = 4
    bench.submit("j-2")
    assert stops(revise(bench, plan("a"))) == [("a", 1, "hold"), ("b", 1, "hold")]


def test_the_newcomer_may_be_gone_again_before_the_group_forms() -> None:
    bench = running()
    bench.connect("c")
    revise(bench, plan("a", "b", "c"))
    bench.do(e.NodeControlled(NodeId("c"), "remove"))
    hold(bench)
    assert [attempt.node_id for attempt in bench.job().attempts] == ["a", "b"]
    bench.ready()
    assert all(attempt.state is AttemptState.READY for attempt in bench.job().attempts)


def test_a_group_that_never_answers_is_given_up_and_the_plan_is_made_again() -> None:
    bench = running()
    bench.connect("c")
    revise(bench, plan("c"))
    bench.size = 1
    bench.wait(TIMING.hand_over_s + 2, heard=("a", "b", "c"))
    assert bench.job().state is JobState.STARTING and bench.job().next_plan is None


OUT_OF_MEMORY = Fault(Reason.OUT_OF_MEMORY, Blame.NODE, "over 1 GiB", "ask for less")


@pytest.mark.parametrize("fault", [OUT_OF_MEMORY, USER_CODE, PEER_LOST])
def test_a_plan_that_cannot_begin_gives_way_to_the_one_that_worked(fault: Fault) -> None:
    """Once: what fails then is treated as ever."""
    bench = running()
    before = bench.job().plan
    revise(bench, plan("a", "b", strategy="pipeline_parallel"))
    hold(bench)
    bench.ready()
    bench.fail(0, held=7, fault=fault)
    assert bench.job().state is JobState.RECOVERING and "back as before" in bench.job().message
    bench.fail(1, held=7)
    job = bench.job()
    assert job.plan == before and job.state is JobState.STARTING and job.fence == 3
    assert job.unfit == {Shape("pipeline_parallel", frozenset({NodeId("a"), NodeId("b")}))} and job.retries == 0
    bench.ready()
    bench.fail(0, held=7, fault=USER_CODE)
    assert bench.job().state is JobState.FAILED


def back_after_a_newcomer_failed() -> Bench:
    """a and b train, c joins and ends before a step, a and b train again."""
    bench = running()
    bench.connect("c")
    revise(bench, plan("a", "b", "c"))
    hold(bench)
    bench.fail(2)
    for rank in (0, 1):
        bench.fail(rank, held=7)
    assert [attempt.node_id for attempt in bench.job().attempts] == ["a", "b"]
    bench.ready()
    return bench


def test_a_newcomer_that_cannot_begin_says_nothing_of_the_strategy_of_those_that_worked() -> None:
    """1. c joins a and b under the same strategy and fails. 2. a and b go on as before. 3. b is lost. What follows is
    asked of the planner as of any interrupted job: the strategy before, with the holder of the newest state."""
    bench = back_after_a_newcomer_failed()
    bench.size = 1
    bench.do(e.NodeControlled(NodeId("b"), "remove"))
    bench.fail(0, held=9)
    bench.wait(3, heard=("a", "c"))
    assert (bench.previous, bench.holders) == ("data_parallel", ("a",))
    assert [attempt.node_id for attempt in bench.job().attempts] == ["a"]


def test_a_group_that_forms_again_does_not_take_the_plan_that_could_not_begin() -> None:
    bench = back_after_a_newcomer_failed()
    bench.size = 3  # the planner would have c again
    bench.progress(9)
    for rank in (0, 1):
        bench.fail(rank, held=9)
    bench.wait(3, heard=("a", "b", "c"))
    assert bench.job().state is JobState.STARTING
    assert [attempt.node_id for attempt in bench.job().attempts] == ["a", "b"]


def test_over_what_is_left_of_the_nodes_that_worked_is_planned_without_the_newcomer() -> None:
    bench = back_after_a_newcomer_failed()
    unfit = plan("a", "b", "c")
    bench.plan_of = lambda nodes, idle: plan("a") if idle == ("a",) else unfit  # type: ignore[method-assign]
    bench.size = 1
    bench.do(e.NodeControlled(NodeId("b"), "cordon"))
    for rank in (0, 1):
        bench.fail(rank, held=9)
    bench.wait(3, heard=("a", "b", "c"))
    assert [attempt.node_id for attempt in bench.job().attempts] == ["a"]


def test_a_pause_while_it_goes_back_leaves_the_plan_that_worked() -> None:
    bench = running()
    before = bench.job().plan
    bench.connect("c")
    revise(bench, plan("a", "b", "c"))
    hold(bench)
    bench.fail(2)
    bench.do(e.UserAsked(JobId("j-1"), "pause"))
    for rank in (0, 1):
        bench.fail(rank, held=7)
    job = bench.job()
    assert (job.state, job.plan, job.next_plan) == (JobState.PAUSED, before, None)


def test_a_plan_that_committed_a_step_is_not_given_up_for_a_fault() -> None:
    bench = running()
    revise(bench, plan("a", "b", strategy="pipeline_parallel"))
    hold(bench)
    bench.ready()
    bench.progress(9)
    bench.fail(0, held=9)
    assert bench.job().next_plan is None and bench.job().reason is Reason.PEER_LOST


def test_a_group_that_never_forms_gives_way_to_the_one_that_worked() -> None:
    bench = running()
    before = bench.job().plan
    bench.connect("c")
    revise(bench, plan("b", "c", strategy="pipeline_parallel"))
    hold(bench)
    bench.wait(TIMING.start_s + 3, heard=("a", "b", "c"))
    for attempt in bench.job().working:
        bench.fail(attempt.rank, held=7)
    assert bench.job().plan == before


def test_a_pause_forgets_what_was_about_to_be() -> None:
    bench = running()
    revise(bench, plan("a"))
    bench.do(e.UserAsked(JobId("j-1"), "pause"))
    hold(bench)
    assert bench.job().state is JobState.PAUSED and bench.job().next_plan is None


def test_a_node_that_turned_out_unfit_and_a_group_without_the_state_are_planned_again() -> None:
    bench = running()
    bench.connect("c")
    revise(bench, plan("a", "c"))
    bench.fail(0, held=None, fault=PEER_LOST)
    bench.fail(1, held=7)
    assert bench.job().attempts[0].node_id == "b", "who has the newest state takes part"


def test_trials_that_are_over_leave_the_plan_that_runs() -> None:
    bench = Bench()
    tried = ("data_parallel", "single_node")
    bench.plan_of = lambda nodes, idle: replace(plan_on(nodes), trials=tried)  # type: ignore[method-assign]
    bench.running("a", "b")
    assert not stops(bench.do(e.Settled(JobId("j-1"), Fence(1))))
    made = bench.job().plan
    assert made is not None and made.trials == () and bench.job().state is JobState.RUNNING
