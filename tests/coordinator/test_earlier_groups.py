"""A job goes back to a group that worked on it before: with the cut that was measured, and only where it can form."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from test_planner import DATA, node
from test_review import CLEAR, PAIR, started

from coordinator.planner import plan
from coordinator.review import RECUT, Standing, Verdict, review
from protos.ids import Fence, NodeId
from protos.jobspec import JobSpec
from protos.plan import Basis, ClusterView, Learned, NodeView, Plan
from qtable.policy import Ledger
from qtable.prior import load_prior

KEY = "as it was"


def basis_of(plan: Plan) -> Basis:
    assert plan.estimate.basis is not None
    return plan.estimate.basis


def uneven(made: Plan) -> Plan:
    (a, b) = made.subtasks
    parts = (replace(a, data_range=(0, 8)), replace(b, data_range=(8, b.data_range[1])))
    return replace(
        made, subtasks=parts, estimate=replace(made.estimate, basis=replace(basis_of(made), combination=KEY))
    )


def looked(
    spec: JobSpec,
    running: Plan,
    earlier: Plan,
    shorter: float,
    cluster: ClusterView | None = None,
    learned: Learned | None = None,
    step: int = 200,
) -> Verdict:
    """The group of `earlier` took `shorter` times what the one that runs takes."""
    step_s = running.estimate.step_s
    standing = Standing(running, Fence(2), step, 100, step_s, changes=1, earlier=(earlier,))
    known = replace(learned or Learned(), steps={KEY: shorter * step_s})
    view = replace(cluster or ClusterView(PAIR), learned=known)
    return review(standing, spec, CLEAR, DATA, view, load_prior().table())


def test_a_job_that_tried_something_else_goes_back_to_the_group_that_was_measured_cut_as_it_was() -> None:
    """What was learned meanwhile would cut it otherwise, and is only predicted to be as quick."""
    spec, made = started(*PAIR, profile=CLEAR)
    _, alone = started(*PAIR, profile=CLEAR, strategy="single_node")
    verdict = looked(spec, alone, uneven(made), 0.2)
    assert verdict.message.startswith("data_parallel on a, b instead of single_node on ")
    assert verdict.plan is not None and basis_of(verdict.plan) == replace(basis_of(uneven(made)), remembered=True)
    assert [each.data_range for each in verdict.plan.subtasks] == [each.data_range for each in uneven(made).subtasks]


@pytest.mark.parametrize("strategy", ["auto", "data_parallel"])
@pytest.mark.parametrize(("shorter", "back"), [(1 / (1.05 + RECUT), True), (1 / (RECUT + 0.95), False)])
def test_an_earlier_cut_of_the_nodes_that_work_has_to_be_clearly_quicker(
    strategy: str, shorter: float, back: bool
) -> None:
    spec, made = started(*PAIR, profile=CLEAR, strategy=strategy)
    verdict = looked(spec, made, uneven(made), shorter)
    assert (verdict.plan is not None) == back
    if verdict.plan is not None:
        assert verdict.message.startswith("data_parallel on a, b instead of data_parallel on a, b: ")
        rows = {each.strategy: each.seconds for each in verdict.plan.candidates if each.measured}
        assert rows["data_parallel as it is"] > rows["data_parallel"], "what it was weighed against is shown"


def without_listener(view: NodeView) -> NodeView:
    return replace(view, capacity=replace(view.capacity, machine_id="", networks=()))


def test_what_runs_is_shown_as_if_it_had_made_the_whole_job_as_all_others_are() -> None:
    spec, made = started(*PAIR, profile=CLEAR, train={"batch_size": 64, "steps": 200_000})
    verdict = looked(spec, made, uneven(made), 0.5, step=180_000)
    assert verdict.plan is not None
    rows = {each.strategy: each.seconds for each in verdict.plan.candidates}
    measured, taken = rows["data_parallel as it is"], rows["data_parallel"]
    assert measured is not None and taken is not None
    assert measured == pytest.approx(2 * taken, rel=0.1)
    assert not any("never explored" in why for each in verdict.plan.candidates if each.measured for why in each.reasons)


@pytest.mark.parametrize(("slower", "back"), [(1.2, True), (1.02, False)])
def test_the_quicker_of_two_strategies_over_the_same_nodes_stays_after_their_trials(slower: float, back: bool) -> None:
    spec, made = started(*PAIR, profile=CLEAR, train={"batch_size": 64, "steps": 200_000})
    asked, _ = started(*PAIR, profile=CLEAR, train={"batch_size": 64, "steps": 200_000}, strategy="model_parallel")
    sharded = plan(asked, CLEAR, DATA, ClusterView(PAIR), load_prior().table(), random.Random(0), Ledger())
    assert {part.node_id for part in sharded.subtasks} == {part.node_id for part in made.subtasks}
    trial = replace(sharded, trials=("model_parallel",), trial_steps=20)
    step_s = slower * made.estimate.step_s
    standing = Standing(trial, Fence(2), 200, 100, step_s, changes=1, earlier=(made,))
    view = ClusterView(PAIR, learned=Learned(steps={basis_of(made).combination: made.estimate.step_s}))
    verdict = review(standing, spec, CLEAR, DATA, view, load_prior().table())
    assert (verdict.plan is not None and verdict.plan.strategy == "data_parallel") == back
    assert verdict.over == (not back)


@pytest.mark.parametrize("third", [True, False])
@pytest.mark.parametrize("why", ["gone", "apart", "another network", "less memory", "more memory needed"])
def test_a_group_that_could_not_form_again_is_not_gone_back_to(why: str, third: bool) -> None:
    """Whether its strategy is still possible over other nodes or not."""
    spec, made = started(*PAIR, profile=CLEAR)
    _, alone = started(*PAIR, profile=CLEAR, strategy="single_node")
    (stays,) = (node for node in PAIR if node.node_id == alone.subtasks[0].node_id)
    (other,) = (node for node in PAIR if node is not stays)
    need = max(made.estimate.memory_bytes.values())
    short = replace(other, capacity=replace(other.capacity, memory_bytes=need))
    more = (node("c"),) if third else ()
    nodes = {"gone": (stays,), "another network": (stays, without_listener(other)), "less memory": (stays, short)}
    apart = {(NodeId("a"), NodeId("b")): "no address answers"} if why == "apart" else {}
    cluster = ClusterView((*nodes.get(why, PAIR), *more), apart=apart)
    learned = Learned(memory={"matmul": 2.0}) if why == "more memory needed" else None
    message = looked(spec, alone, uneven(made), 0.01, cluster, learned).message
    assert not message.startswith("data_parallel on a, b ")
