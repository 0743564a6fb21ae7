"""What finished jobs teach: the next prediction of the same job, of the same node, over the same network."""

from __future__ import annotations

import asyncio
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_planner_learning import CLUSTER, DATA, PROFILE, job, ran

from coordinator import views
from coordinator.cli import plan_view
from coordinator.comparison import compare
from coordinator.learning import OUTCOME, Learner, Measured, outcome_payload
from coordinator.planner import plan
from coordinator.speeds import LIMIT, Average, Speeds
from coordinator.store.memory import MemoryStore
from protos import documents
from protos.capacity import LinkEstimate
from protos.ids import NodeId
from protos.plan import ClusterView, Factors, Learned, Plan, Work
from protos.work import Usage
from strategies.base import Inputs
from strategies.learned import factors, model_key, with_running
from strategies.memory import RESERVE_BYTES


def decide(learned: Learned | None = None, **parts: Any) -> Plan:
    learner = Learner(Path("/nonexistent/qtable.json"))
    cluster = ClusterView(CLUSTER.nodes, learned=learned or Learned())
    return plan(job(**parts), PROFILE, DATA, cluster, learner.table, random.Random(0), learner.ledger)


def usage(compute_s: float, sync_s: float = 0.0, cpu_s: float = 0.0, carrying_s: float = 0.0) -> Usage:
    return Usage(
        64_000, 1000, 1000 * (compute_s + sync_s), 0.0, 0.0, 0, 3 * 10**8, baseline_memory_bytes=2 * 10**8,
        step_compute_s=compute_s, step_sync_s=sync_s, step_bytes_sent=77, step_cpu_s=cpu_s, step_carrying_s=carrying_s,
    )  # fmt: skip


def outcome(made: Plan, factors: dict[str, float], wait_s: float = 0.0) -> dict[str, Any]:
    """Of ranks that computed so many times as long as predicted, and waited for the slowest of them."""
    computed = [factors.get(rank.node_id, 1.0) * rank.compute_s for rank in made.estimate.ranks]
    slowest = max(computed)
    usages = tuple((k, usage(each, slowest - each + wait_s)) for k, each in enumerate(computed))
    payload = outcome_payload(made, Measured(True, 1, 1000, slowest + wait_s, 0.5, usages=usages))
    known: dict[str, Any] = json.loads(json.dumps(payload))
    return known


def taught(*payloads: dict[str, Any]) -> Speeds:
    speeds = Speeds()
    assert all(speeds.apply(payload) for payload in payloads)
    return speeds


def test_the_same_job_again_is_predicted_as_it_was_measured() -> None:
    made = decide(strategy="single_node")
    known = taught(outcome(made, {"a": 1.7, "b": 1.7})).learned()
    again = decide(known, strategy="single_node", nodes={"require": {"names": ["a"]}})
    assert again.estimate.step_s == pytest.approx(1.7 * made.estimate.step_s)
    assert again.estimate.basis is not None and again.estimate.basis.remembered
    assert again.estimate.seconds > made.estimate.seconds
    assert "this very job ran before" in plan_view.plan(documents.plain(again))


def test_a_model_that_was_seen_is_predicted_with_its_own_ratio_in_another_batch() -> None:
    made = decide(strategy="single_node", train={"batch_size": 64})
    known = taught(outcome(made, {"a": 1.7, "b": 1.7})).learned()
    plain = decide(strategy="single_node", train={"batch_size": 128})
    again = decide(known, strategy="single_node", train={"batch_size": 128}, nodes={"require": {"names": ["a"]}})
    assert again.estimate.basis is not None and not again.estimate.basis.remembered
    assert again.estimate.step_s == pytest.approx(1.7 * plain.estimate.step_s)


def test_another_model_of_the_family_is_corrected_half_way_at_first() -> None:
    made = decide(strategy="single_node", nodes={"require": {"names": ["a"]}})
    learned = taught(outcome(made, {"a": 4.0})).learned()
    (key,) = learned.speeds
    assert key == (NodeId("a"), "matmul", Work.WHOLE)
    assert learned.speeds[key].work == pytest.approx(2.0, rel=0.05)
    assert learned.speeds[key].overhead == 1.0, "the overhead is a small part of this step: nothing was learned of it"


def test_a_kind_of_work_that_was_never_tried_is_expected_to_be_off_by_half_of_what_the_node_turned_out_to_be() -> None:
    made = decide(strategy="single_node", nodes={"require": {"names": ["a"]}})
    known = taught(outcome(made, {"a": 4.0})).learned()
    sharded: dict[str, Any] = {"strategy": {"model_parallel": {"kind": "sharded", "ranks": 2}}}
    ranks = {rank.node_id: rank for rank in decide(known, **sharded).estimate.ranks}
    assert ranks[NodeId("a")].learned.work == pytest.approx(math.sqrt(2.0), rel=0.05)
    assert ranks[NodeId("b")].learned.work == 1.0


def test_a_stage_with_next_to_nothing_says_nothing_about_the_rest_of_the_model() -> None:
    """It took a third of what was predicted for it: whoever takes that for the node's speed gives it half of the model
    the next time."""
    made = decide(strategy="data_parallel")
    first, second = made.estimate.ranks
    assert made.estimate.basis is not None
    basis = replace(made.estimate.basis, work=Work.STAGE)
    for share, taught_nodes in ((0.01, {"b"}), (0.9, {"a", "b"})):
        ranks = (replace(first, compute_s=share * second.compute_s), second)
        staged = replace(made, estimate=replace(made.estimate, ranks=ranks, basis=basis))
        known = taught(outcome(staged, {"a": 0.35})).learned()
        assert {node for node, *_ in known.models} == {node for node, *_ in known.speeds} == taught_nodes


def test_a_slow_node_gets_fewer_samples_the_next_time() -> None:
    made = decide(strategy="data_parallel")
    assert [subtask.data_range for subtask in made.subtasks] == [(0, 32), (32, 64)]
    known = taught(outcome(made, {"b": 3.0})).learned()
    share = {
        subtask.node_id: subtask.data_range[1] - subtask.data_range[0]
        for subtask in decide(known, strategy="data_parallel").subtasks
    }
    assert share[NodeId("a")] == pytest.approx(48, abs=1) and sum(share.values()) == 64


def test_waiting_that_computing_does_not_explain_is_the_networks() -> None:
    made = decide(strategy="data_parallel")
    exposed_s = made.estimate.step_s - max(rank.compute_s for rank in made.estimate.ranks)
    slow = taught(outcome(made, {}, wait_s=0.5 * made.estimate.step_s)).learned()
    assert slow.networks[("loopback", Work.REPLICA)] > 2
    quick = taught(outcome(made, {}, wait_s=exposed_s)).learned()
    assert quick.networks.get(("loopback", Work.REPLICA), 1.0) == pytest.approx(1.0)


def far_apart(learned: Learned | None = None) -> Plan:
    """Of a group that waits for its network noticeably long."""
    learner = Learner(Path("/nonexistent/qtable.json"))
    links = {(NodeId("a"), NodeId("b")): LinkEstimate(2.0, 1e9, None)}
    cluster = ClusterView(CLUSTER.nodes, links, learned or Learned())
    return plan(
        job(strategy="data_parallel"), PROFILE, DATA, cluster, learner.table, random.Random(0), learner.ledger
    )  # fmt: skip


def exposed_s(made: Plan) -> float:
    return made.estimate.step_s - max(rank.compute_s for rank in made.estimate.ranks)


def test_jobs_that_were_planned_at_once_teach_a_network_no_more_than_it_did() -> None:
    """Five jobs were planned before any had ended, and waiting took twice as long in all of them."""
    made = far_apart()
    lesson = outcome(made, {}, wait_s=2 * exposed_s(made))
    assert lesson["network"]["factor"] == 1.0
    factor = taught(*[lesson] * 5).learned().networks[("loopback", Work.REPLICA)]
    assert 1.7 < factor <= 2.0


def test_jobs_one_after_the_other_teach_a_network_what_it_really_takes() -> None:
    """Each is predicted with what was learned before it, and says so."""
    speeds, true_s = Speeds(), 3 * exposed_s(far_apart())
    for _ in range(12):
        networks = speeds.learned().networks
        made = far_apart(Learned(networks=networks))
        lesson = outcome(made, {}, wait_s=true_s)
        assert lesson["network"]["factor"] == networks.get(("loopback", Work.REPLICA), 1.0)
        assert speeds.apply(lesson)
    assert speeds.learned().networks[("loopback", Work.REPLICA)] == pytest.approx(3.0, rel=0.1)


def test_an_outcome_of_an_older_version_is_read_as_it_was_meant() -> None:
    """It does not say with which factor it was predicted: the one that is known when it is read stands for it."""
    made = far_apart()
    assert made.estimate.basis is not None
    older = replace(made, estimate=replace(made.estimate, basis=replace(made.estimate.basis, network_factor=None)))
    lesson = outcome(older, {}, wait_s=2 * exposed_s(made))
    assert "factor" not in lesson["network"]
    assert taught(lesson, lesson).learned().networks[("loopback", Work.REPLICA)] == pytest.approx(2.0, rel=0.05)


CAP = 0.25  # of a core


def capped(network: str = "10.0.0.0/8") -> Plan:
    """A group of nodes with a quarter of a core each."""
    made = decide(strategy="data_parallel")
    ranks = tuple(replace(rank, cores=CAP) for rank in made.estimate.ranks)
    coordination = replace(made.coordination_plan, network=network)
    return replace(made, estimate=replace(made.estimate, ranks=ranks), coordination_plan=coordination)


def in_bursts(made: Plan, network: float = 0.0) -> dict[str, Any]:
    """Of ranks that computed what was predicted, but three times as fast as their cap goes on, for what they did not
    use of it while they waited; `network`: of their cap, what carrying messages took."""
    alone = [rank.compute_s for rank in made.estimate.ranks]
    step_s = max(alone) * (1 + network)
    usages = tuple(
        (k, usage(each / 3, step_s - each / 3, CAP * each, CAP * network * each)) for k, each in enumerate(alone)
    )
    payload: dict[str, Any] = json.loads(
        json.dumps(outcome_payload(made, Measured(True, 1, 1000, step_s, 0.5, usages=usages)))
    )
    return payload


def test_a_capped_node_that_computed_in_bursts_is_no_quicker_alone() -> None:
    """It used what its cap allows all the same: CPU time over the granted cores is what it takes alone."""
    known = taught(in_bursts(capped())).learned()
    assert all(factor == pytest.approx(1.0) for factor in known.models.values())
    alone = decide(known, strategy="single_node")
    assert alone.estimate.step_s == pytest.approx(decide(strategy="single_node").estimate.step_s)


def test_a_step_that_took_as_long_as_a_cap_lets_it_says_nothing_about_the_network_between_machines() -> None:
    assert not taught(in_bursts(capped(), network=0.5)).learned().networks
    known = taught(in_bursts(capped("loopback"), network=0.5)).learned()
    assert known.networks[("loopback", Work.REPLICA)] > 1, "over loopback cores are all there is"


def test_repeated_outcomes_settle_and_what_is_learned_stays_within_bounds() -> None:
    speeds = Speeds()
    for _ in range(30):
        made = decide(speeds.learned(), strategy="data_parallel")
        predicted = made.estimate.basis
        assert predicted is not None
        true_s = {rank.node_id: 1.5 * rank.compute_s / rank.learned.work for rank in made.estimate.ranks}
        factors = {str(rank.node_id): true_s[rank.node_id] / rank.compute_s for rank in made.estimate.ranks}
        speeds.apply(outcome(made, factors))
    assert decide(speeds.learned(), strategy="data_parallel").estimate.ranks[0].learned.work == pytest.approx(
        1.5, rel=0.1
    )
    taught_by_nonsense = taught(outcome(decide(strategy="single_node"), {"a": 1e9, "b": 1e9})).learned()
    assert all(factors.work <= math.exp(LIMIT) for factors in taught_by_nonsense.speeds.values())


def test_an_outcome_of_another_cost_model_or_one_that_does_not_count_teaches_nothing() -> None:
    payload = outcome(decide(strategy="single_node"), {})
    assert not Speeds().apply({**payload, "cost_model_version": -1})
    assert not Speeds().apply({**payload, "counted": False})
    assert not Speeds().apply({key: value for key, value in payload.items() if key != "basis"}), "of an older version"


def test_speeds_are_rebuilt_from_the_log_and_an_odd_outcome_is_passed_over(tmp_path: Path) -> None:
    async def story() -> None:
        store, learner = MemoryStore(), Learner(tmp_path / "qtable.json")
        made = decide(strategy="single_node")
        said = Measured(True, 1, 1000, 2 * made.estimate.step_s, 0.5, usages=((0, usage(2 * made.estimate.step_s)),))
        await ran(store, made, said)
        await learner.catch_up(store)
        learned = learner.speeds.learned()
        assert learned.models and learned.steps
        again = Learner(tmp_path / "qtable.json")
        await again.catch_up(store)
        await again.catch_up(store)
        assert again.speeds.learned() == learned
        (event,) = await store.events(kinds=[OUTCOME])
        assert not again.apply(event.seq, OUTCOME, json.loads(event.payload_json))

    asyncio.run(story())


def test_a_node_shows_what_was_learned_of_it() -> None:
    speeds = taught(outcome(decide(strategy="data_parallel"), {"b": 3.0}))
    shown = speeds.of_node(NodeId("b"))
    assert list(shown) == ["matmul/replica/work"]
    assert shown["matmul/replica/work"]["factor"] == pytest.approx(math.sqrt(3.0), rel=0.05)
    assert shown["matmul/replica/work"]["jobs"] == 1
    assert views.node(CLUSTER.nodes[1], None, shown)["learned"] == shown
    assert views.node(CLUSTER.nodes[1], None)["learned"] == {}


@given(st.lists(st.floats(-LIMIT, LIMIT), min_size=1, max_size=50))
def test_an_average_stays_within_what_it_saw(values: list[float]) -> None:
    average = Average()
    for value in values:
        average = average.with_(value)
    assert min([*values, 0.0]) - 1e-9 <= average.mean <= max([*values, 0.0]) + 1e-9
    assert average.variance >= 0 and average.count == len(values)


def test_predicted_and_measured_stand_beside_each_other() -> None:
    made = decide(strategy="data_parallel")
    table = compare(made, [(0, usage(0.2, 0.1)), (1, usage(0.25, 0.05))], {NodeId("a"): "anna"}, 0.3)
    assert set(table) == {"anna", "b"}
    predicted, measured = table["anna"]["predicted"], table["anna"]["measured"]
    assert predicted["step_s"] == made.estimate.step_s
    assert predicted["memory_bytes"] == made.estimate.memory_bytes[NodeId("a")] - RESERVE_BYTES
    assert measured == {"step_s": 0.3, "compute_s": 0.2, "bytes": 77, "memory_bytes": 10**8}
    text = plan_view.plan(documents.plain(made), {"step_s": 0.3, "nodes": table})
    assert "PREDICTED" in text and "MEASURED" in text and "anna" in text


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ((), 1.0),
        ((2.0,), 1.0),
        ((2.0, 2.0), 1.0),
        ((2.0, 2.0, 2.0), 2.0),
        ((0.5, 0.5, 0.5), 0.5),
        ((2.0, 0.5), 1.0),
        ((3.0, 1.0, 0.4), 1.0),
    ],
)
def test_what_several_nodes_were_off_by_is_the_models_doing_and_what_one_was_off_by_its_own(
    others: tuple[float, ...], expected: float
) -> None:
    """A node that never ran the model, nor its family of layers."""
    spec, late = job(), replace(CLUSTER.nodes[0], node_id=NodeId("late"), name="late")
    key, ran_before = model_key(PROFILE, spec.train), [NodeId(f"n{k}") for k in range(len(others))]
    models = {(node_id, key, Work.WHOLE): off for node_id, off in zip(ran_before, others, strict=True)}
    speeds = {
        (node_id, "matmul", Work.WHOLE): Factors(off, 1.0) for node_id, off in zip(ran_before, others, strict=True)
    }
    for learned in (Learned(models=models), Learned(speeds=speeds), Learned(speeds, models)):
        inputs = Inputs(spec, PROFILE, DATA, ClusterView((late,), learned=learned))
        assert factors(inputs, Work.WHOLE)[late.node_id].work == pytest.approx(expected)


def test_a_model_that_is_slower_than_its_family_on_several_nodes_is_so_on_the_next() -> None:
    spec, names = job(), [NodeId("n0"), NodeId("n1"), NodeId("n2")]
    key = model_key(PROFILE, spec.train)
    learned = Learned(
        {(name, "matmul", Work.WHOLE): Factors(1.5, 4.0) for name in (*names, NodeId("a"))},
        {(name, key, Work.WHOLE): 3.0 for name in names},
    )
    found = factors(Inputs(spec, PROFILE, DATA, ClusterView(CLUSTER.nodes, learned=learned)), Work.WHOLE)
    assert found[NodeId("a")].work == pytest.approx(3.0) and found[NodeId("b")].work == pytest.approx(3.0)


def running(made: Plan, learned: Learned, step_s: float, off: dict[str, float], **parts: Any) -> Learned:
    """What is known while `made` runs; `off`: its ranks' computing beside what the formulas say."""
    inputs = Inputs(job(**parts), PROFILE, DATA, ClusterView(CLUSTER.nodes, learned=learned))
    alone_s = {k: off[rank.node_id] * rank.compute_s for k, rank in enumerate(made.estimate.ranks)}
    return with_running(inputs, made.estimate, step_s, alone_s).cluster.learned


@pytest.mark.parametrize(("off", "elsewhere"), [(1.69, 1.3), (4.0, math.sqrt(2.0)), (0.25, math.sqrt(0.5))])
def test_ranks_of_a_running_group_tell_half_of_other_kinds_of_work_where_those_are_unknown(
    off: float, elsewhere: float
) -> None:
    """But never of more than a factor of two: a job that is far slower than predicted may try another way."""
    made = decide(strategy="data_parallel")
    assert made.estimate.basis is not None
    key = made.estimate.basis.model
    known = Learned(models={(NodeId("b"), key, Work.WHOLE): 1.5})
    models = running(made, known, 0.1, {"a": off, "b": 1.0}, strategy="data_parallel").models
    assert models[NodeId("a"), key, Work.REPLICA] == pytest.approx(off)
    assert models[NodeId("a"), key, Work.WHOLE] == models[NodeId("a"), key, Work.STAGE] == pytest.approx(elsewhere)
    assert models[NodeId("b"), key, Work.WHOLE] == 1.5, "it was measured"


@pytest.mark.parametrize("learned_before", [1.0, 3.0])
def test_a_node_that_is_slower_than_it_was_for_the_same_model_is_so_at_any_kind_of_work(learned_before: float) -> None:
    """Whatever the plan was made with: what was learned since is not counted twice."""
    alone: dict[str, Any] = {"strategy": "single_node", "nodes": {"require": {"names": ["a"]}}}
    made = decide(**alone)
    assert made.estimate.basis is not None
    key = made.estimate.basis.model
    known = Learned(
        models={(NodeId("a"), key, Work.WHOLE): learned_before, (NodeId("a"), key, Work.REPLICA): 1.2 * learned_before}
    )
    inputs = Inputs(job(**alone), PROFILE, DATA, ClusterView(CLUSTER.nodes, learned=known))
    models = with_running(inputs, made.estimate, 3.0 * made.estimate.step_s, {}).cluster.learned.models
    assert models[NodeId("a"), key, Work.WHOLE] == pytest.approx(3.0)
    assert models[NodeId("a"), key, Work.REPLICA] == pytest.approx(3.6)


def test_a_group_that_computes_as_is_known_of_its_nodes_teaches_nothing_of_other_kinds_of_work() -> None:
    """Most of these steps is overhead, and that is what was learned."""
    made = decide(strategy="data_parallel")
    assert made.estimate.basis is not None
    ranks = tuple(replace(rank, overhead_s=0.9 * rank.compute_s) for rank in made.estimate.ranks)
    made = replace(made, estimate=replace(made.estimate, ranks=ranks))
    kinds = {
        (NodeId(name), "matmul", work): Factors(1.0, 3.0) for name in ("a", "b") for work in (Work.WHOLE, Work.REPLICA)
    }
    after = running(made, Learned(speeds=kinds), 0.1, {"a": 2.8, "b": 2.8}, strategy="data_parallel").models
    key = made.estimate.basis.model
    assert {round(after[NodeId(name), key, work], 6) for name in ("a", "b") for work in (Work.WHOLE, Work.REPLICA)} == {
        2.8
    }


def test_of_several_ranks_on_a_node_the_slowest_says_what_it_takes() -> None:
    made = decide(strategy="data_parallel")
    assert made.estimate.basis is not None
    first = made.estimate.ranks[0]
    ranks = tuple(replace(first, node_id=NodeId("a")) for _ in range(3))
    made = replace(made, estimate=replace(made.estimate, ranks=ranks))
    inputs = Inputs(job(strategy="data_parallel"), PROFILE, DATA, CLUSTER)
    alone_s = {0: first.compute_s, 1: 3.0 * first.compute_s, 2: first.compute_s}
    models = with_running(inputs, made.estimate, 0.1, alone_s).cluster.learned.models
    assert models[NodeId("a"), made.estimate.basis.model, Work.REPLICA] == pytest.approx(3.0)
