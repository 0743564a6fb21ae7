"""Whether a running job changes its plan: the real planner over nodes whose speeds turn out otherwise."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from test_planner import DATA, job, model, node

from coordinator.control.shape import shape_of
from coordinator.planner import plan, replan
from coordinator.review import HOPELESS, MOST_CHANGES, MOST_TRYING, Standing, Verdict, review
from protos.ids import Fence, NodeId
from protos.jobspec import JobSpec
from protos.model import ModelProfile
from protos.plan import ClusterView, Layout, Learned, NodeView, Plan, Schedule
from protos.work import StepTimes
from qtable.policy import Ledger
from qtable.prior import load_prior
from qtable.table import QTable
from strategies.base import Inputs
from strategies.learned import with_running

CLOSE = model(42_000_000, 1e8)  # gradients take about as long as a second node saves
CLEAR = model(10_000, 1e8)  # two nodes are nearly twice as fast as one
PAIR = (node("a"), node("b"))
PLAIN = {"sync": {"compression": "none"}}


def started(*nodes: NodeView, profile: ModelProfile, table: QTable | None = None, **parts: Any) -> tuple[JobSpec, Plan]:
    spec = job(**parts)
    known = table or load_prior().table()
    return spec, plan(spec, profile, DATA, ClusterView(nodes), known, random.Random(0), Ledger())


def reviewed(
    spec: JobSpec,
    made: Plan,
    *nodes: NodeView,
    profile: ModelProfile,
    slower: float,
    step: int = 60,
    fence: int = 1,
    learned: Learned | None = None,
    **more: Any,
) -> Verdict:
    """`slower`: the measured step over the one that was predicted."""
    standing = Standing(made, Fence(fence), step, more.pop("steps_here", step), slower * made.estimate.step_s, **more)
    return review(standing, spec, profile, DATA, ClusterView(nodes, learned=learned or Learned()), load_prior().table())


def taught(made: Plan, slower: float) -> Learned:
    """By a trial."""
    basis = made.estimate.basis
    assert basis is not None
    return Learned(steps={basis.combination: slower * made.estimate.step_s})


def test_a_strategy_that_runs_as_predicted_stays() -> None:
    spec, made = started(*PAIR, profile=CLEAR)
    assert (made.strategy, made.trials) == ("data_parallel", ())
    verdict = reviewed(spec, made, *PAIR, profile=CLEAR, slower=1.05)
    assert (verdict.plan, verdict.over, verdict.message) == (None, False, "data_parallel stays")


def test_a_strategy_that_is_far_slower_than_predicted_gives_way() -> None:
    spec, made = started(*PAIR, profile=CLEAR)
    verdict = reviewed(spec, made, *PAIR, profile=CLEAR, slower=4.0)
    assert verdict.plan is not None and verdict.plan.strategy == "single_node"
    assert "single_node" in verdict.message
    assert {subtask.node_id for subtask in verdict.plan.subtasks} <= {"a", "b"}


def test_a_node_that_is_slower_alone_would_be_so_in_a_group() -> None:
    spec, made = started(*PAIR, profile=model(50_000_000, 1e7), **PLAIN)
    assert made.strategy == "single_node"
    verdict = reviewed(spec, made, PAIR[0], profile=model(50_000_000, 1e7), slower=4.0)
    assert verdict.plan is None, verdict.message
    other = reviewed(spec, made, *PAIR, profile=model(50_000_000, 1e7), slower=4.0)
    assert other.plan is not None and other.plan.strategy == "single_node", "the other node is as quick as it was"


def test_little_before_the_end_nothing_changes() -> None:
    spec, made = started(*PAIR, profile=CLEAR)
    assert made.steps is not None
    verdict = reviewed(spec, made, *PAIR, profile=CLEAR, slower=4.0, step=made.steps - 1)
    assert verdict.plan is None


def test_a_strategy_that_the_job_names_stays_however_slow() -> None:
    spec, made = started(*PAIR, profile=CLEAR, strategy="data_parallel")
    assert reviewed(spec, made, *PAIR, profile=CLEAR, slower=20.0).plan is None


@pytest.mark.parametrize("asked", ["auto", "data_parallel"])
def test_a_node_that_came_joins_where_that_pays(asked: str) -> None:
    spec, made = started(*PAIR, profile=CLEAR, strategy=asked)
    three = (*PAIR, node("c"))
    verdict = reviewed(spec, made, *three, profile=CLEAR, slower=1.0)
    assert verdict.plan is not None and verdict.plan.strategy == "data_parallel"
    assert {subtask.node_id for subtask in verdict.plan.subtasks} == {"a", "b", "c"}
    assert verdict.message.startswith("c joins the group: ")
    assert reviewed(spec, made, *three, profile=CLEAR, slower=1.0, step=int((made.steps or 0) * 0.999)).plan is None


def test_a_job_on_one_node_takes_in_another_one() -> None:
    spec, made = started(PAIR[0], profile=CLEAR)
    assert made.strategy == "single_node"
    verdict = reviewed(spec, made, *PAIR, profile=CLEAR, slower=1.0)
    assert verdict.plan is not None and verdict.plan.strategy == "data_parallel"


def test_a_job_that_shrank_goes_back_to_the_strategy_its_file_names() -> None:
    spec = job(strategy="data_parallel")
    alone = replace(started(PAIR[0], profile=CLEAR)[1], trials=())
    verdict = reviewed(spec, alone, *PAIR, profile=CLEAR, slower=0.1, fence=2)
    assert verdict.plan is not None and verdict.plan.strategy == "data_parallel"


def test_a_job_that_names_one_node_moves_only_to_a_quicker_one() -> None:
    spec, made = started(PAIR[0], profile=CLEAR, strategy="single_node")
    assert reviewed(spec, made, *PAIR, profile=CLEAR, slower=1.01).plan is None
    quick = reviewed(spec, made, PAIR[0], node("gaming-pc", 100.0), profile=CLEAR, slower=1.0)
    assert quick.plan is not None and quick.message.startswith("gaming-pc joins the group, a is left out of it")


def long_job(profile: ModelProfile = CLOSE) -> tuple[JobSpec, Plan]:
    """So long that a few steps of each are worth it."""
    return started(*PAIR, profile=profile, train={"batch_size": 64, "steps": 200_000}, **PLAIN)


def test_close_strategies_of_a_long_job_are_tried_one_after_the_other_and_the_quickest_stays() -> None:
    spec, made = long_job()
    first, second = made.trials
    assert made.strategy == first and 20 <= made.trial_steps <= 50
    verdict = reviewed(spec, made, *PAIR, profile=CLOSE, slower=1.3)
    tried = verdict.plan
    assert tried is not None and (tried.strategy, tried.trials) == (second, (second,))
    known = taught(made, 1.3)
    good = reviewed(spec, tried, *PAIR, profile=CLOSE, slower=0.5, step=120, fence=2, learned=known)
    assert (good.plan, good.over) == (None, True), "the quickest is the one that runs"
    known = taught(made, 0.9)
    slow = {"slower": 1.2, "step": 120, "fence": 2, "learned": known}
    (other,) = {each.node_id for each in PAIR} - set(shape_of(tried).nodes)
    third = reviewed(spec, tried, *PAIR, profile=CLOSE, **slow)
    assert third.plan is not None and shape_of(third.plan).nodes == {other}, (
        "it may be quicker than the one that was not"
    )
    assert third.message.startswith(f"tries single_node on {other} for ")
    alone = frozenset({replace(shape_of(tried), nodes=frozenset({other}))})
    back = reviewed(spec, tried, *PAIR, profile=CLOSE, **slow, unfit=alone)
    assert back.plan is not None and (back.plan.strategy, back.plan.trials) == (first, ())


def test_a_long_job_on_one_node_is_tried_on_another_that_may_be_quicker_and_the_quicker_keeps_it() -> None:
    alike = (node("a"), node("b"), node("snail", 0.05))
    spec, made = started(*alike, profile=CLOSE, train={"batch_size": 64, "steps": 200_000}, nodes={"max": 1}, **PLAIN)
    assert made.strategy == "single_node"
    first = {part.node_id for part in made.subtasks}
    (name,) = {"a", "b"} - first
    verdict = reviewed(spec, made, *alike, profile=CLOSE, slower=1.0)
    assert verdict.message.startswith(f"tries single_node on {name} for ")
    tried = verdict.plan
    assert tried is not None and {part.node_id for part in tried.subtasks} == {name}
    assert tried.trials == (f"single_node on {name}",), "the snail has no chance"
    (candidate,) = (each for each in tried.candidates if each.strategy == "single_node")
    assert (candidate.nodes, candidate.measured) == ((name,), False), "what is shown is the node that is taken"
    known = taught(made, 1.0)
    stays = reviewed(spec, tried, *alike, profile=CLOSE, slower=0.8, step=120, fence=2, learned=known)
    assert (stays.plan, stays.over) == (None, True)
    back = reviewed(spec, tried, *alike, profile=CLOSE, slower=1.2, step=120, fence=2, learned=known)
    assert back.plan is not None and {part.node_id for part in back.plan.subtasks} == first and not back.plan.trials


def test_nodes_of_one_name_are_told_apart() -> None:
    twins = (node("a"), replace(node("b"), name="twin"), replace(node("c"), name="twin"))
    spec, made = started(*twins, profile=CLOSE, train={"batch_size": 64, "steps": 200_000}, nodes={"max": 1}, **PLAIN)
    (first,) = {part.node_id for part in made.subtasks}
    tried = reviewed(spec, made, *twins, profile=CLOSE, slower=1.0).plan
    assert tried is not None
    others = {each.node_id for each in twins} - {first}
    wanted = {f"single_node on {each}" for each in others}
    assert set(tried.trials) == wanted and shape_of(tried).nodes <= others


@pytest.mark.parametrize("slower", [1.3, 1.6, 2.0])
@pytest.mark.parametrize("steps", [2_000, 200_000])
def test_a_model_that_is_slower_than_predicted_everywhere_does_not_go_from_node_to_node(
    slower: float, steps: int
) -> None:
    """16 nodes alike, and a model that none of them trains as quickly as predicted: what each group has shown is known
    to the next decision."""
    many = [node(f"n{number}") for number in range(16)]
    spec, made = started(*many, profile=CLOSE, train={"batch_size": 64, "steps": steps}, nodes={"max": 1}, **PLAIN)
    alone_s, learned, changes, at = slower * made.estimate.step_s, Learned(), 0, 0
    while True:
        at += 100
        standing = Standing(made, Fence(changes + 1), at, 100, alone_s, changes)
        verdict = review(standing, spec, CLOSE, DATA, ClusterView(tuple(many), learned=learned), load_prior().table())
        if verdict.plan is None:
            break
        inputs = Inputs(spec, CLOSE, DATA, ClusterView(tuple(many), learned=learned))
        learned = with_running(inputs, made.estimate, alone_s, {}).cluster.learned
        made, changes = verdict.plan, changes + 1
    assert changes <= (2 if steps == 2_000 else MOST_TRYING), "in days of work a few trials cost next to nothing"


def test_a_trial_that_can_no_longer_win_is_left_out() -> None:
    spec, made = long_job()
    verdict = reviewed(spec, made, *PAIR, profile=CLOSE, slower=0.2)
    assert (verdict.plan, verdict.over) == (None, True)


def test_a_job_does_not_change_for_ever() -> None:
    spec, made = long_job()
    assert reviewed(spec, made, *PAIR, profile=CLOSE, slower=1.3, changes=MOST_CHANGES).plan is None


def test_a_trial_runs_its_steps_unless_it_is_hopeless_and_none_begins_just_before_the_end() -> None:
    spec, made = long_job()
    early = reviewed(spec, made, *PAIR, profile=CLOSE, slower=1.3, step=20)
    assert (early.plan, early.over) == (None, False)
    hopeless = reviewed(spec, made, *PAIR, profile=CLOSE, slower=20.0, step=20)
    assert hopeless.plan is not None and hopeless.plan.strategy != made.strategy
    assert made.steps is not None
    assert reviewed(spec, made, *PAIR, profile=CLOSE, slower=1.1, step=made.steps - 60).plan is None


@pytest.mark.parametrize(("times", "ended"), [(HOPELESS - 0.2, False), (HOPELESS + 0.2, True)])
def test_a_trial_is_ended_early_where_it_is_far_slower_than_another(times: float, ended: bool) -> None:
    spec, made = long_job()
    assert made.strategy == "data_parallel", "one that runs alone would tell of the other, too"
    next_s = next(each.step_s for each in made.candidates if each.strategy == made.trials[1])
    assert next_s is not None
    verdict = reviewed(spec, made, *PAIR, profile=CLOSE, slower=times * next_s / made.estimate.step_s, step=20)
    assert (verdict.plan is not None) is ended


def test_a_node_far_away_that_no_plan_takes_holds_up_no_change() -> None:
    """The state of the model would take hours to it."""
    spec, made = long_job()
    made = replace(made, trials=(), trial_steps=0)
    far = node("far", 0.01)
    far = replace(far, capacity=replace(far.capacity, bandwidth_bytes_per_s=1e3))
    near = reviewed(spec, made, *PAIR, profile=CLOSE, slower=4.0)
    assert near.plan is not None
    assert reviewed(spec, made, *PAIR, far, profile=CLOSE, slower=4.0).message == near.message


def test_a_strategy_that_could_not_begin_is_not_proposed_again() -> None:
    spec, made = started(*PAIR, profile=CLEAR)
    proposed = reviewed(spec, made, *PAIR, profile=CLEAR, slower=4.0).plan
    assert proposed is not None and proposed.strategy == "single_node"
    unfit = frozenset(replace(shape_of(proposed), nodes=frozenset({each.node_id})) for each in PAIR)
    assert reviewed(spec, made, *PAIR, profile=CLEAR, slower=4.0, unfit=unfit).plan is None


@pytest.mark.parametrize("asked", ["auto", "data_parallel"])
def test_a_group_that_could_not_begin_with_a_newcomer_is_not_proposed_again(asked: str) -> None:
    spec, made = started(*PAIR, profile=CLEAR, strategy=asked)
    three = (*PAIR, node("c"))
    proposed = reviewed(spec, made, *three, profile=CLEAR, slower=1.0).plan
    assert proposed is not None
    unfit = frozenset({shape_of(proposed)})
    assert reviewed(spec, made, *three, profile=CLEAR, slower=1.0, unfit=unfit).plan is None
    fourth = reviewed(spec, made, *three, node("d"), profile=CLEAR, slower=1.0, unfit=unfit).plan
    assert fourth is not None, "over other nodes it is another plan"


def test_the_strategy_that_the_file_names_is_not_gone_back_to_over_nodes_with_which_it_could_not_begin() -> None:
    spec = job(strategy="data_parallel")
    alone = replace(started(PAIR[0], profile=CLEAR)[1], trials=())
    proposed = reviewed(spec, alone, *PAIR, profile=CLEAR, slower=0.1, fence=2).plan
    assert proposed is not None
    unfit = frozenset({shape_of(proposed)})
    assert reviewed(spec, alone, *PAIR, profile=CLEAR, slower=0.1, fence=2, unfit=unfit).plan is None


def test_short_jobs_and_clear_cases_have_no_trials() -> None:
    assert started(*PAIR, profile=CLOSE, **PLAIN)[1].trials == ()
    far = model(50_000_000, 1e7)
    assert started(*PAIR, profile=far, train={"batch_size": 64, "steps": 20_000}, **PLAIN)[1].trials == ()


def test_what_a_change_may_cost_if_it_is_wrong_and_what_it_was_weighed_against_is_in_the_plan() -> None:
    alike = (node("a"), node("b"))
    spec, made = started(*alike, profile=CLOSE, train={"batch_size": 64, "steps": 200_000}, nodes={"max": 1}, **PLAIN)
    (first,) = shape_of(made).nodes
    verdict = reviewed(spec, made, *alike, profile=CLOSE, slower=1.0)
    assert verdict.plan is not None and verdict.plan.expected_loss_s > 0
    rows = {each.strategy: each for each in verdict.plan.candidates}
    assert rows[f"single_node on {first}"].measured and not rows["single_node"].measured
    assert rows["single_node"].nodes != rows[f"single_node on {first}"].nodes == (first,)
    dear = replan("data_parallel", job(), CLEAR, DATA, ClusterView(PAIR), load_prior().table())
    assert dear.expected_loss_s > 0


@pytest.mark.parametrize("known", [True, False])
def test_the_node_that_holds_up_its_group_gets_less_once_the_ranks_have_said_what_they_compute(known: bool) -> None:
    three = (node("a"), node("b"), node("c"))
    spec, made = started(*three, profile=CLEAR, **PLAIN)
    assert (made.strategy, len(made.estimate.ranks)) == ("data_parallel", 3)
    slow = next(number for number, rank in enumerate(made.estimate.ranks) if rank.node_id == "b")
    own_s = [rank.compute_s * (6.0 if number == slow else 1.0) for number, rank in enumerate(made.estimate.ranks)]
    longer_s = max(own_s) - max(rank.compute_s for rank in made.estimate.ranks)
    times = {number: StepTimes(each, max(own_s) - each, 0.0, 0.0) for number, each in enumerate(own_s)}
    verdict = reviewed(
        spec,
        made,
        *three,
        profile=CLEAR,
        slower=1 + longer_s / made.estimate.step_s,
        **({"times": times} if known else {}),
    )
    assert verdict.plan is not None
    if known:
        assert verdict.message.startswith("another cut of the same nodes: ")
        slices = {part.node_id: part.data_range[1] - part.data_range[0] for part in verdict.plan.subtasks}
        assert 0 < 4 * slices[NodeId("b")] < slices[NodeId("a")]
    else:
        assert verdict.plan.strategy == "single_node", "it may be any of them, or the network"


def test_ranks_that_share_single_layers_cannot_tell_computing_from_waiting() -> None:
    _, made = started(*PAIR, profile=CLEAR)
    times = {number: StepTimes(0.1, 0.1, 0.1, 0.0) for number in range(2)}
    assert Standing(made, Fence(1), 60, 60, 0.2, times=times).told
    shared = replace(made, layout=Layout(((0, 1),), (), 1, Schedule.ONE_F_ONE_B, tensor=2))
    assert not Standing(shared, Fence(1), 60, 60, 0.2, times=times).told


@pytest.mark.parametrize(
    ("slow", "said_of_it", "off"), [(1.0, "d joins", 10.0), (200.0, "c is left out", math.sqrt(10))]
)
def test_what_no_rank_computes_is_expected_of_the_same_nodes_and_half_of_it_of_others(
    slow: float, said_of_it: str, off: float
) -> None:
    """Steps take ten times as long as what ranks compute explains: the link of one of them may have become slow, and
    stay behind with it."""
    three = (node("a"), node("b"), node("c"))
    spec, made = started(*three, profile=CLEAR, strategy="data_parallel", **PLAIN)
    own_s = [(slow if rank.node_id == "c" else 1.0) * rank.compute_s for rank in made.estimate.ranks]
    explained_s = made.estimate.step_s + max(own_s) - max(rank.compute_s for rank in made.estimate.ranks)
    times = {number: StepTimes(each, 1.0, 0.0, 0.0) for number, each in enumerate(own_s)}
    nodes = (*three, node("d")) if slow == 1.0 else three
    slower = 10 * explained_s / made.estimate.step_s
    verdict = reviewed(spec, made, *nodes, profile=CLEAR, slower=slower, times=times)
    assert verdict.plan is not None and verdict.message.startswith(said_of_it)
    expected_ms = float(verdict.message.split(": ")[1].split(" ms")[0])
    assert expected_ms == pytest.approx(1000 * off * verdict.plan.estimate.step_s, rel=0.05)
