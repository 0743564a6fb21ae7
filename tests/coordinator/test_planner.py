from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import pytest

from coordinator.planner import placeable_when_idle, plan, replan, spare_plans
from coordinator.smallest_change import Trials
from protos import documents
from protos.capacity import Capacity, FamilyRate, TrustedNetwork
from protos.errors import ErrorCode, NoPlacement
from protos.ids import NodeId
from protos.jobspec import JobSpec, StrategyName, parse
from protos.model import Complexity, Family, LayerProfile, ModelProfile, Requirements
from protos.plan import ClusterView, DataProfile, NodeView, Plan
from protos.states import Activity, Eligibility, NodeLink
from qtable.policy import Ledger
from qtable.prior import load_prior
from qtable.state import StateKey
from qtable.table import QTable
from strategies.base import Inputs
from strategies.links import trusted_groups

GIB = 1024**3
DATA = DataProfile("", 64_000, 10**6)


def node(name: str, gflops: float = 10.0, lan: bool = True, activity: Activity = Activity.IDLE) -> NodeView:
    networks = (TrustedNetwork("192.168.1.0/24", "eth0", ""),) if lan else ()
    capacity = Capacity(
        hostname=name, machine_id=name, platform="", python="", cores=4.0, cores_total=4, memory_bytes=8 * GIB,
        memory_total_bytes=8 * GIB, disk_free_bytes=0, families={"matmul": FamilyRate(gflops * 1e9, 0.001)},
        networks=networks, rtt_s=0.0005, bandwidth_bytes_per_s=117e6,
    )  # fmt: skip
    return NodeView(NodeId(name), name, capacity, NodeLink.CONNECTED, Eligibility.OK, activity)


def model(parameters: int = 1_000_000, flops: float = 1e9) -> ModelProfile:
    layer = LayerProfile("layer", "Linear", parameters, flops, 1e5, 4e3, (10,))
    return ModelProfile(
        "pytorch", "source", Family.MLP, "", parameters, 4 * parameters, True, ("float32",), (64,),
        Complexity.MEDIUM, (layer,), Requirements(1, GIB, 0, 1, "layers"), 1.0,
    )  # fmt: skip


def job(**parts: Any) -> JobSpec:
    return parse({"model": {"source": "m.py:f"}, "data": {"source": "d"}, "train": {"batch_size": 64}, **parts})


def decide(
    *nodes: NodeView, profile: ModelProfile | None = None, table: QTable | None = None, ledger: Ledger | None = None,
    seed: int = 0, **parts: Any,
) -> Plan:  # fmt: skip
    rng = random.Random(seed)
    known = table or load_prior().table()
    return plan(job(**parts), profile or model(), DATA, ClusterView(nodes), known, rng, ledger or Ledger())


def test_all_five_strategies_are_listed_with_predictions_or_reasons() -> None:
    made = decide(node("a"), node("b"))
    by_name = {candidate.strategy: candidate for candidate in made.candidates}
    assert list(by_name) == [name.value for name in StrategyName]
    for name in ("data_parallel", "single_node"):
        assert by_name[name].feasible
        assert by_name[name].seconds
    assert by_name["federated"].reasons == ("not built yet",)
    assert by_name["model_parallel"].reasons[0].startswith("every node holds the whole model")
    assert by_name["pipeline_parallel"].reasons == ("the model cannot be cut into stages: it was not examined",)
    assert by_name["single_node"].bytes == 0.0
    assert by_name["data_parallel"].bytes == pytest.approx(1000 * 2 * 4e6)


def test_heavy_compute_goes_to_all_nodes_and_heavy_gradients_to_one() -> None:
    nodes = (node("gaming-pc"), node("laptop"))
    assert decide(*nodes, profile=model(10_000, 1e10)).strategy == "data_parallel"
    made = decide(*nodes, profile=model(50_000_000, 1e7))
    assert made.strategy == "single_node"
    assert made.reason.startswith("single_node on gaming-pc: predicted ")
    assert "data_parallel " in made.reason
    assert "(sync " in made.reason
    assert made.reason.endswith("the shortest prediction")


def test_the_plan_says_how_the_ranks_meet_and_is_a_document() -> None:
    made = decide(node("a"), node("b"), strategy="data_parallel")
    coordination = made.coordination_plan
    assert (coordination.network, coordination.retries) == ("192.168.1.0/24", 3)
    assert coordination.rendezvous == "store over the session stream"
    assert coordination.deadline_s >= 120
    assert made.steps == 1000
    assert made.parameters == 1_000_000
    assert documents.decode(Plan, documents.encode(made)) == made
    assert decide(node("a")).coordination_plan.network == ""


def test_the_state_is_the_cell_of_the_job_and_the_usable_nodes() -> None:
    assert decide(node("a"), node("b"), node("c")).state == (1, 1, 1, 0)
    assert decide(node("a"), node("b", activity=Activity.BUSY)).state == (1, 1, 0, 0)


def test_a_strategy_the_job_names_is_taken_although_another_is_faster() -> None:
    made = decide(node("a"), node("b"), profile=model(50_000_000, 1e7), strategy="data_parallel")
    assert (made.strategy, made.propensity) == ("data_parallel", 1.0)
    assert made.reason.endswith("as the job file asks")


def test_a_strategy_the_job_names_that_cannot_be_is_refused_with_its_reasons_only() -> None:
    with pytest.raises(NoPlacement) as refused:
        decide(node("a", lan=False), node("b", lan=False), strategy="data_parallel")
    assert refused.value.code is ErrorCode.NO_PLACEMENT
    assert refused.value.exit_code == 7
    assert "--trusted-lan" in refused.value.message
    assert "--trusted-lan" in refused.value.hint
    assert "single_node:" not in refused.value.message


def test_without_nodes_every_strategy_says_why_and_the_hint_says_how_to_get_one() -> None:
    with pytest.raises(NoPlacement) as refused:
        decide()
    assert "single_node: no usable node has joined." in refused.value.message
    assert "data_parallel: needs 2 usable nodes, there are none." in refused.value.message
    assert "federated: not built yet." in refused.value.message
    assert "hive-node" in refused.value.hint


def test_when_no_node_lends_the_gpu_that_is_asked_for_the_hint_is_about_gpus() -> None:
    with pytest.raises(NoPlacement) as refused:
        decide(node("a"), nodes={"require": {"gpu": True}})
    assert "GPU" in refused.value.hint and "uncordon" not in refused.value.hint


def test_busy_nodes_are_worth_waiting_for_and_unfitting_ones_are_not() -> None:
    busy = ClusterView((node("a", activity=Activity.BUSY),))
    with pytest.raises(NoPlacement, match="a is BUSY"):
        plan(job(), model(), DATA, busy, load_prior().table(), random.Random(0), Ledger())
    assert placeable_when_idle(job(), model(), DATA, busy)
    assert not placeable_when_idle(job(), model(parameters=10**10), DATA, busy)
    assert not placeable_when_idle(job(strategy="data_parallel"), model(), DATA, busy)
    assert not placeable_when_idle(job(), model(), DATA, ClusterView((node("a", activity=Activity.PAUSED),)))


def test_near_equal_strategies_are_tried_with_the_propensity_the_plan_states() -> None:
    nodes, rich = (node("a"), node("b")), Ledger(job_s=1e9)
    even, plain = model(42_000_000, 1e8), {"compression": "none"}
    seen = {decide(*nodes, profile=even, ledger=rich, seed=seed, sync=plain).strategy: seed for seed in range(200)}
    ratio = [c.seconds for c in decide(*nodes, profile=even, sync=plain).candidates if c.seconds]
    assert 1 / 1.1 < ratio[0] / ratio[1] < 1.1, "the scene needs two near-equal predictions"
    assert set(seen) == {"data_parallel", "single_node"}
    greedy = decide(*nodes, profile=even, sync=plain).strategy
    for strategy, seed in seen.items():
        made = decide(*nodes, profile=even, ledger=rich, seed=seed, sync=plain)
        assert made.propensity == pytest.approx(0.95 if strategy == greedy else 0.05)


def test_learned_corrections_are_shown_and_decide() -> None:
    table = load_prior().table()
    before = decide(node("a"), node("b"), profile=model(10_000, 1e10))
    for _ in range(5):
        table.learn(StateKey(*before.state), "data_parallel", -1.5)
    after = decide(node("a"), node("b"), profile=model(10_000, 1e10), table=table)
    assert (before.strategy, after.strategy) == ("data_parallel", "single_node")
    shown = next(candidate for candidate in after.candidates if candidate.strategy == "data_parallel")
    assert (shown.visits, shown.feasible) == (5, True)
    assert shown.residual < -1.0
    assert "earlier jobs like this one" in after.reason


def again(previous: str, *nodes: NodeView, holders: tuple[str, ...] = (), **parts: Any) -> Plan:
    kept = tuple(NodeId(name) for name in holders)
    return replan(previous, job(**parts), model(), DATA, ClusterView(nodes), load_prior().table(), holders=kept)


def test_an_interrupted_job_keeps_its_strategy_while_it_fits_and_shrinks_to_one_node() -> None:
    three = again("data_parallel", node("a"), node("b"), node("c"))
    assert three.strategy == "data_parallel"
    one = again("data_parallel", node("b"), strategy="data_parallel")
    assert (one.strategy, one.subtasks[0].node_id, one.subtasks[0].data_range) == ("single_node", "b", (0, 64))
    assert "data_parallel is over: needs 2 usable nodes, there is 1" in one.reason
    assert again("single_node", node("a"), node("b"), strategy="single_node").strategy == "single_node"


def test_a_job_on_one_node_becomes_data_parallel_where_its_file_allows_that() -> None:
    """1 forced: as soon as there are two nodes 2 auto: when that is clearly quicker 3 any other word is obeyed."""
    slow_links = model(50_000_000, 1e7)
    two = ClusterView((node("a"), node("b")))

    def goes_on(profile: ModelProfile, table: QTable | None = None, **parts: Any) -> Plan:
        return replan(
            "single_node", job(**parts), profile, DATA, two, table or load_prior().table(), holders=[NodeId("a")]
        )

    back = goes_on(slow_links, strategy="data_parallel")
    assert (back.strategy, {subtask.node_id for subtask in back.subtasks}) == ("data_parallel", {"a", "b"})
    assert back.reason.endswith("as the job file asks, now that it can be")
    assert goes_on(slow_links).strategy == "single_node"
    heavy = model(10_000, 1e10)
    assert goes_on(heavy).strategy == "data_parallel"
    assert goes_on(heavy, strategy="single_node").strategy == "single_node"
    assert goes_on(heavy, nodes={"max": 1}).strategy == "single_node"
    table = load_prior().table()
    for _ in range(5):  # what the table has learned of such jobs counts as it does for one that starts
        table.learn(StateKey(*goes_on(heavy).state), "data_parallel", -1.5)
    assert goes_on(heavy, table).strategy == "single_node"


def test_an_interrupted_job_goes_on_where_its_newest_state_is() -> None:
    nodes = (node("fast", 50.0), node("slow"))
    made = again("single_node", *nodes, holders=("slow",), strategy="single_node")
    assert made.subtasks[0].node_id == "slow"


def test_a_lower_bound_of_nodes_is_kept_when_nodes_are_lost() -> None:
    with pytest.raises(NoPlacement, match=r"data_parallel: needs 2 usable nodes.*single_node: nodes.min asks for 2"):
        again("data_parallel", node("a"), nodes={"min": 2})


def stack(blocks: int, parameters: int, flops: float = 1e9) -> ModelProfile:
    """A model that can be cut after each of its layers."""
    layers = tuple(LayerProfile(f"h.{k}", "Conv2d", parameters, flops, 1e5, 4e3, (10,), 4e3) for k in range(blocks))
    total = blocks * parameters
    return replace(model(total), layers=layers, family=Family.CNN, why_not_cut="")


LARGER_THAN_A_NODE = stack(8, 100_000_000)  # 12 GiB with Adam; a node grants 8


def test_a_model_larger_than_any_node_is_cut_and_the_plan_says_how() -> None:
    made = decide(*(node(name) for name in "abc"), profile=LARGER_THAN_A_NODE)
    by_name = {candidate.strategy: candidate for candidate in made.candidates}
    assert not by_name["single_node"].feasible and not by_name["data_parallel"].feasible
    assert by_name["pipeline_parallel"].feasible and by_name["model_parallel"].feasible
    assert made.strategy == "pipeline_parallel", "sharding sends the whole model three times in each step"
    assert made.layout is not None and made.links
    stages = made.layout.stages
    assert (stages[0][0], stages[-1][1]) == (0, 8)
    assert [subtask.layer_range for subtask in sorted(made.subtasks, key=lambda each: each.stage)] == list(stages)
    assert f"({len(stages)} stages, " in made.reason and "1f1b" in made.reason
    assert "every micro-batch" in made.coordination_plan.barriers[-1]
    assert documents.decode(Plan, documents.encode(made)) == made


def test_an_interrupted_pipeline_goes_on_with_the_nodes_left_or_by_any_way_that_fits() -> None:
    def again_with(*names: str, **parts: Any) -> Plan:
        cluster = ClusterView(tuple(node(name) for name in names))
        asked = job(strategy={"pipeline_parallel": {"stages": 3}}, **parts)
        return replan("pipeline_parallel", asked, LARGER_THAN_A_NODE, DATA, cluster, load_prior().table())

    assert len(again_with("a", "b", "c").subtasks) == 3
    assert len(again_with("a", "b").subtasks) == 2, "three stages were asked for, two nodes are left"
    whole = replan(
        "pipeline_parallel", job(), replace(LARGER_THAN_A_NODE, why_not_cut="it loops"), DATA,
        ClusterView((node("a"), node("b"), node("c"), node("d"))), load_prior().table(),
    )  # fmt: skip
    assert whole.strategy == "model_parallel"
    assert "pipeline_parallel is over: the model cannot be cut into stages: it loops" in whole.reason
    with pytest.raises(NoPlacement, match="single_node"):
        again_with("a")


def test_the_loss_of_any_one_node_and_of_two_is_planned_beforehand() -> None:
    nodes = tuple(node(name) for name in "abc")
    made = decide(*nodes, strategy="data_parallel")
    spares = spare_plans(made, job(strategy="data_parallel"), model(), DATA, ClusterView(nodes))
    assert [spare.lost for spare in spares] == [("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c")]
    assert [spare.strategy for spare in spares] == ["data_parallel"] * 3 + ["single_node"] * 3
    assert spares[0].nodes == ("b", "c") and spares[-1].nodes == ("a",)
    assert all(spare.seconds for spare in spares)


def test_a_loss_that_nothing_survives_is_said_with_the_reason() -> None:
    nodes = tuple(node(name) for name in "ab")
    made = decide(*nodes, profile=LARGER_THAN_A_NODE)
    spares = spare_plans(made, job(), LARGER_THAN_A_NODE, DATA, ClusterView(nodes))
    assert [(spare.lost, spare.strategy) for spare in spares] == [(("a",), ""), (("b",), "")]
    assert all("needs 2 usable nodes" in spare.reason for spare in spares)


def test_what_would_make_a_job_fit_is_tried_out_before_it_is_said() -> None:
    with pytest.raises(NoPlacement) as refused:
        decide(node("a"), profile=stack(8, 80_000_000))
    hint = refused.value.hint
    assert "train.optimizer: sgd" in hint
    more = float(hint.split(" GiB more memory on a")[0].rsplit(" ", 1)[1])
    enough, short = 8 + more, 8 + more - 0.2
    for memory, fits in ((enough, True), (short, False)):
        roomy = node("a")
        roomy = replace(roomy, capacity=replace(roomy.capacity, memory_bytes=int(memory * GIB)))
        cluster = ClusterView((roomy,))
        assert placeable_when_idle(job(), stack(8, 80_000_000), DATA, cluster) == fits


UNLIKE = [
    replace(each, capacity=replace(each.capacity, memory_bytes=int((1 + 0.37 * k) * GIB)))
    for k, each in enumerate(node(f"n{k}", 5.0 + 3 * k) for k in range(8))
]


@pytest.mark.parametrize("strategy", ["auto", "pipeline_parallel"])
@pytest.mark.parametrize("blocks", [8, 24])
def test_a_refusal_over_eight_unlike_nodes_does_not_hold_up_the_control_loop(strategy: str, blocks: int) -> None:
    """The leases of all nodes live 5 s, and the loop plans in one of its turns."""
    took = []
    for _ in range(3):
        started = time.process_time()
        with pytest.raises(NoPlacement):
            decide(*UNLIKE, profile=stack(blocks, 400_000_000), strategy=strategy)
        took.append(time.process_time() - started)
    assert min(took) < 0.5


def test_the_changes_that_are_tried_are_counted_and_a_pipeline_is_asked_in_its_smallest_shape() -> None:
    cluster = ClusterView((node("a"), node("b")))
    trials = Trials(left=2)
    inputs = Inputs(job(strategy="pipeline_parallel"), LARGER_THAN_A_NODE, DATA, cluster)
    assert trials.fits(inputs) and trials.fits(inputs) and not trials.fits(inputs)
    layers = tuple(replace(layer, activation_bytes_per_sample=5e8) for layer in stack(4, 60_000_000).layers)
    profile = replace(stack(4, 60_000_000), layers=layers)
    with pytest.raises(NoPlacement) as refused:
        decide(node("a"), node("b"), profile=profile, strategy={"pipeline_parallel": {"microbatches": 2}})
    assert "strategy: pipeline_parallel without options; or train.batch_size: 4" in refused.value.hint
    assert decide(node("a"), node("b"), profile=profile, strategy="pipeline_parallel")
    with pytest.raises(NoPlacement) as refused:
        decide(node("a"), node("b"), profile=stack(4, 300_000_000), strategy="pipeline_parallel")
    assert "train.optimizer: sgd, which keeps no state; or 9.6 GiB more memory on a" in refused.value.hint


def test_nodes_that_cannot_connect_to_each_other_work_alone_and_the_plan_says_why() -> None:
    deaf = "b does not listen for other nodes"
    pair = {(NodeId("a"), NodeId("b")): deaf}
    table, heavy = load_prior().table(), model(10_000, 1e10)

    def planned(*names: str, apart: dict[tuple[NodeId, NodeId], str], **parts: Any) -> Plan:
        cluster = ClusterView(tuple(node(name) for name in names), apart=apart)
        return plan(job(**parts), heavy, DATA, cluster, table, random.Random(0), Ledger())

    alone = planned("a", "b", apart=pair)
    assert (alone.strategy, len(alone.subtasks)) == ("single_node", 1)
    reasons = {candidate.strategy: candidate.reasons for candidate in alone.candidates}
    for name in ("data_parallel", "pipeline_parallel", "model_parallel"):
        assert reasons[name] == (f"no two of the 2 usable nodes can connect to each other: {deaf}",)
    with pytest.raises(NoPlacement) as refused:
        planned("a", "b", apart=pair, strategy="data_parallel")
    assert deaf in refused.value.message and "--no-peer" in refused.value.hint
    others = {**pair, (NodeId("b"), NodeId("c")): deaf}
    together = planned("a", "b", "c", apart=others)
    assert {subtask.node_id for subtask in together.subtasks} == {"a", "c"}
    said = next(each for each in together.candidates if each.strategy == "data_parallel")
    assert said.feasible and said.reasons == (f"without b: {deaf}",)


def test_two_nodes_that_are_apart_are_never_in_one_group_and_each_joins_the_others() -> None:
    nodes = tuple(node(name) for name in "abcd")
    groups = trusted_groups(nodes, {(NodeId("a"), NodeId("b")): "x"})
    assert sorted("".join(each.node_id for each in group.nodes) for group in groups) == ["acd", "bcd"]
    islands = {(NodeId(x), NodeId(y)): "x" for x in "ab" for y in "cd"}
    assert sorted("".join(n.node_id for n in group.nodes) for group in trusted_groups(nodes, islands)) == ["ab", "cd"]
    assert [len(group.nodes) for group in trusted_groups(nodes)] == [4]


def test_a_strategy_that_does_not_fit_is_answered_with_those_that_do() -> None:
    with pytest.raises(NoPlacement) as refused:
        decide(*(node(name) for name in "abc"), profile=LARGER_THAN_A_NODE, strategy="single_node")
    assert "strategy: model_parallel or pipeline_parallel" in refused.value.hint
    with pytest.raises(NoPlacement) as refused:
        heavy = replace(model().layers[0], activation_bytes_per_sample=1e9)
        train = {"batch_size": 64, "accumulate": 2}
        decide(node("a"), profile=replace(model(), layers=(heavy,)), train=train)
    assert "train.accumulate: auto" in refused.value.hint


def test_the_spares_of_a_pipeline_are_pipelines_while_it_fits() -> None:
    nodes = tuple(node(name) for name in "abc")
    made = decide(*nodes, profile=LARGER_THAN_A_NODE)
    assert made.strategy == "pipeline_parallel"
    spares = spare_plans(made, job(), LARGER_THAN_A_NODE, DATA, ClusterView(nodes))
    alone = [spare for spare in spares if len(spare.lost) == 1]
    assert {spare.strategy for spare in alone} == {"pipeline_parallel"}
    assert all(len(spare.nodes) == 2 and not set(spare.lost) & set(spare.nodes) for spare in alone)
    assert {spare.strategy for spare in spares if len(spare.lost) == 2} <= {""}
