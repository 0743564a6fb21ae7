"""Pipelines as they are planned: shapes, shares, memory, links, and why there is none."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from test_cost_strategies import GIB, ask, node

from protos.capacity import LinkEstimate
from protos.errors import NoPlacement
from protos.ids import NodeId
from protos.model import Complexity, Family, LayerProfile, ModelProfile, Requirements
from protos.plan import Layout, Schedule
from strategies.base import Inputs, PlacedEstimate
from strategies.learned import combination
from strategies.links import LOOPBACK_BYTES_PER_S
from strategies.memory import stage_reserve_bytes
from strategies.pipeline_parallel import PipelineParallel, micro_batch_counts

P = PipelineParallel()


def stack(
    blocks: int = 8, parameters: int = 1_000_000, flops: float = 1e9, activation: float = 1e5, cut: float | None = 4e3
) -> ModelProfile:
    layers = tuple(
        LayerProfile(f"h.{k}", "Linear", parameters, flops, activation, 4e3, (10,), cut) for k in range(blocks)
    )
    total = blocks * parameters
    return ModelProfile(
        "pytorch", "source", Family.MLP, "", total, 4 * total, True, ("float32",), (64,), Complexity.MEDIUM, layers,
        Requirements(1, GIB, 0, 1, "layers"), 1.0, why_not_cut="",
    )  # fmt: skip


def pipeline(options: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    return {"strategy": {"pipeline_parallel": options or {}}, **parts}


def layout_of(placed: PlacedEstimate) -> Layout:
    assert placed.layout is not None
    return placed.layout


def reason(inputs: Inputs) -> str:
    (said,) = P.feasible(inputs)
    with pytest.raises(NoPlacement, match="pipeline_parallel"):
        P.estimate(inputs)
    return said


def test_a_node_twice_as_fast_gets_twice_the_layers() -> None:
    inputs = ask(node("slow", 10.0), node("fast", 20.0), profile=stack(12), **pipeline())
    placed = P.estimate(inputs)
    layout = layout_of(placed)
    sizes = {p.node_id: b - a for p, (a, b) in zip(placed.placements, layout.stages, strict=True)}
    assert sizes == {"fast": 8, "slow": 4}
    assert layout.cut_after == (f"h.{layout.stages[0][1] - 1}",)
    assert [p.samples for p in placed.placements] == [64, 64]
    assert len(set(placed.accumulate)) == 1
    assert placed.cost.step_s == pytest.approx(
        sum(placed.cost.terms[name] for name in ("compute", "bubble", "sync", "optimizer"))
    )


def test_a_model_larger_than_any_node_is_cut_so_that_every_stage_fits() -> None:
    """16 B for each of 800 million parameters are 12 GiB; each node grants 8 GiB."""
    nodes = (node("a"), node("b"), node("c"))
    inputs = ask(*nodes, profile=stack(8, 100_000_000))
    placed = P.estimate(inputs)
    assert len(placed.nodes) >= 2
    assert all(need <= 0.85 * 8 * GIB for need in placed.cost.memory_bytes.values())
    assert sum(placed.cost.memory_bytes.values()) > 16 * 800_000_000


def test_memory_of_a_stage_is_exact() -> None:
    inputs = ask(
        node("a"), node("b"), profile=stack(2), train={"batch_size": 8}, **pipeline({"stages": 2, "microbatches": 4})
    )
    placed = P.estimate(inputs)
    rows, micro = 2, 4
    new_gradient = 4 * 1_000_000
    fixed = 16 * 1_000_000 + new_gradient + stage_reserve_bytes()
    crossing = micro * rows * 4e3  # the first gets gradients back, the second activations: one buffer each
    first = fixed + rows * (2 * 1e5 + 2 * 4e3) + crossing
    second = fixed + rows * (1e5 + 2 * 4e3) + crossing
    assert [placed.cost.memory_bytes[p.node_id] for p in placed.placements] == [int(first), int(second)]


def test_replicas_share_the_cut_and_take_samples_by_the_speed_of_their_chain() -> None:
    nodes = [node("a", 20.0), node("b", 20.0), node("c", 10.0), node("d", 10.0)]
    inputs = ask(*nodes, profile=stack(8), **pipeline({"stages": 2, "replicas": 2}))
    placed = P.estimate(inputs)
    layout = layout_of(placed)
    assert (layout.replicas, len(layout.stages)) == (2, 2)
    assert [(p.rank, p.stage, p.replica) for p in placed.placements] == [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)]
    for rank, placement in enumerate(placed.placements):
        assert (layout.stage_of(rank), layout.replica_of(rank)) == (placement.stage, placement.replica)
    shares = {p.replica: p.samples for p in placed.placements}
    assert sum(shares.values()) == 64
    assert shares[0] == shares[1], "hosts of one stage are alike, so the replicas are"
    subtasks = P.decompose(inputs, placed)
    assert [each.data_range for each in subtasks] == [(0, 32), (0, 32), (32, 64), (32, 64)]
    assert [each.layer_range for each in subtasks] == [*layout.stages, *layout.stages]
    assert {each.synchronization for each in subtasks} == {"activations, all_reduce"}
    assert subtasks[0].output_shape == subtasks[1].input_shape == (10,)


def test_unlike_replicas_take_unlike_shares() -> None:
    nodes = [node("a", 40.0), node("b", 20.0), node("c", 20.0), node("d", 10.0)]
    inputs = ask(*nodes, profile=stack(8), **pipeline({"stages": 2, "replicas": 2, "microbatches": 4}))
    shares = {p.replica: p.samples for p in P.estimate(inputs).placements}
    assert sum(shares.values()) == 64
    assert min(shares.values()) >= 4
    assert max(shares.values()) > 36


def test_gradients_of_a_replicated_stage_stay_on_its_fast_link() -> None:
    """Two machines with two nodes each: large gradients over loopback, small activations between the machines."""
    nodes = [node(name, machine_id=name[0]) for name in ("a1", "b1", "a2", "b2")]
    inputs = ask(*nodes, profile=stack(8, 20_000_000), **pipeline({"stages": 2, "replicas": 2}))
    placed = P.estimate(inputs)
    by_stage = [{p.node_id[0] for p in placed.placements if p.stage == stage} for stage in (0, 1)]
    assert all(len(machines) == 1 for machines in by_stage)
    heavy = [use for use in placed.links if use.a[0] == use.b[0]]
    light = [use for use in placed.links if use.a[0] != use.b[0]]
    assert min(use.bytes_per_step for use in heavy) > 100 * max(use.bytes_per_step for use in light)
    assert heavy[0].seconds == pytest.approx(2 * heavy[0].bytes_per_step / 2 / 2 / LOOPBACK_BYTES_PER_S, rel=0.1)


def test_the_bytes_of_a_step_are_those_of_its_links() -> None:
    inputs = ask(node("a"), node("b"), node("c"), profile=stack(8), **pipeline({"stages": 3}))
    placed = P.estimate(inputs)
    assert placed.cost.bytes_per_step == 2 * 2 * 64 * 4e3
    assert sum(use.bytes_per_step for use in placed.links) == placed.cost.bytes_per_step
    assert len(placed.links) == 2


def test_a_tied_tensor_is_summed_between_the_stages_that_use_it() -> None:
    plain = stack(4)
    tied = replace(plain, layers=(*plain.layers[:-1], replace(plain.layers[-1], borrowed_parameters=1_000_000)))
    both = [P.estimate(ask(node("a"), node("b"), profile=profile, **pipeline())) for profile in (plain, tied)]
    assert both[1].cost.bytes_per_step - both[0].cost.bytes_per_step == pytest.approx(2 * 4e6)
    assert both[1].cost.peak_memory_bytes > both[0].cost.peak_memory_bytes + 15e6


def test_slow_links_are_not_between_stages_when_others_will_do() -> None:
    slow = {(NodeId(name), NodeId("c")): LinkEstimate(0.2, 1e4, None) for name in "ab"}
    inputs = ask(node("a"), node("b"), node("c"), profile=stack(6), links=slow, **pipeline())
    assert set(P.estimate(inputs).nodes) == {"a", "b"}


def test_options_are_obeyed() -> None:
    nodes = [node(name) for name in "abcd"]
    asked = {"stages": 3, "replicas": 1, "microbatches": 16, "schedule": "gpipe"}
    placed = P.estimate(ask(*nodes, profile=stack(8), **pipeline(asked)))
    layout = layout_of(placed)
    assert (len(layout.stages), layout.replicas, layout.schedule) == (3, 1, Schedule.GPIPE)
    assert placed.accumulate == (16, 16, 16)
    few = P.estimate(ask(*nodes, profile=stack(8), train={"batch_size": 64, "accumulate": 8}, **pipeline()))
    assert set(few.accumulate) == {8}


@pytest.mark.parametrize(
    ("options", "parts", "words"),
    [
        ({"stages": 9}, {}, "the model can be cut into 8 at most"),
        ({"stages": 2, "replicas": 3}, {}, "need 6 nodes, 4 share a network"),
        ({"microbatches": 65}, {}, "65 micro-batches were asked for, a replica has 64 samples"),
        ({"stages": 4, "microbatches": 2}, {}, "schedule: gpipe"),
        ({}, {"nodes": {"max": 1}}, "nodes.max is 1"),
        ({"replicas": 2}, {"train": {"batch_size": 1}}, "a batch of 1 samples has none"),
    ],
)
def test_options_that_cannot_be_are_refused_with_the_reason(
    options: dict[str, Any], parts: dict[str, Any], words: str
) -> None:
    assert words in reason(ask(*(node(name) for name in "abcd"), profile=stack(8), **pipeline(options), **parts))


def test_a_model_that_cannot_be_cut_is_masked_with_its_own_reason() -> None:
    whole = replace(stack(), why_not_cut="its forward calls a layer twice")
    assert reason(ask(node("a"), node("b"), profile=whole)).endswith("its forward calls a layer twice")
    assert "no place for a cut" in reason(ask(node("a"), node("b"), profile=stack(3, cut=None)))


def test_no_network_one_node_and_memory_are_said_with_numbers() -> None:
    assert "--trusted-lan" in reason(ask(node("a", lan=None), node("b", lan=None), profile=stack()))
    assert "needs 2 usable nodes" in reason(ask(node("a"), profile=stack()))
    huge = reason(ask(node("a"), node("b"), profile=stack(4, 10**9)))
    assert huge.startswith("the piece that ends with h.") and "85% of what a grants is 6.8 GiB" in huge
    wide = reason(ask(node("a"), node("b"), profile=stack(64, 30_000_000)))
    assert wide.startswith("all stages need 29.") and "what the nodes grant is 13.6 GiB" in wide


def test_a_holder_of_the_newest_state_takes_part() -> None:
    nodes = [node("a", 50.0), node("b", 50.0), node("c", 0.5)]
    assert "c" not in P.estimate(ask(*nodes, profile=stack(4))).nodes
    assert "c" in P.estimate(ask(*nodes, profile=stack(4), holders=["c"])).nodes


def test_nodes_min_and_max_bound_the_chain() -> None:
    nodes = [node(name) for name in "abcd"]
    assert len(set(P.estimate(ask(*nodes, profile=stack(8), nodes={"max": 2})).nodes)) == 2
    assert len(set(P.estimate(ask(*nodes, profile=stack(8), nodes={"min": 4})).nodes)) == 4


def test_gpipe_holds_more_than_one_f_one_b() -> None:
    def peak(schedule: str) -> int:
        asked = {"stages": 2, "microbatches": 16, "schedule": schedule}
        profile = stack(4, activation=1e7)
        return P.estimate(ask(node("a"), node("b"), profile=profile, **pipeline(asked))).cost.peak_memory_bytes

    assert peak("gpipe") > 2 * peak("1f1b") - stage_reserve_bytes()


def test_counts_of_micro_batches_are_divisors_of_the_batch_where_there_are_any() -> None:
    counts = micro_batch_counts(ask(node("a"), train={"batch_size": 60}), 60)
    assert counts == (1, 2, 3, 5, 10, 15, 30, 60)
    assert all(b >= 1.4 * a for a, b in pairwise(counts))
    assert micro_batch_counts(ask(node("a"), train={"batch_size": 60}), 20)[-1] == 15
    assert micro_batch_counts(ask(node("a"), train={"batch_size": 61}), 61) == (1, 2, 4, 8, 16, 32, 61)


def test_every_replica_has_whole_micro_batches_where_the_batch_allows_it() -> None:
    nodes = [node("a", 40.0), node("b", 20.0), node("c", 20.0), node("d", 10.0)]
    for micro in (4, 8):
        asked = pipeline({"stages": 2, "replicas": 2, "microbatches": micro})
        samples = [p.samples for p in P.estimate(ask(*nodes, profile=stack(8), **asked)).placements]
        assert all(count % micro == 0 for count in samples)


def test_what_is_left_over_of_a_batch_fills_the_pipeline_once_more() -> None:
    def compute_s(batch: int) -> float:
        asked = pipeline({"stages": 2, "microbatches": 4}, train={"batch_size": batch})
        placed = P.estimate(ask(node("a"), node("b"), profile=stack(8, flops=1e8), **asked))
        return placed.cost.terms["compute"] + placed.cost.terms["bubble"]

    assert compute_s(61) > compute_s(64)


def test_sixteen_unlike_nodes_are_planned_and_none_twice() -> None:
    nodes = [node(f"n{k:02}", 5.0 + k, memory_bytes=(4 + k % 3) * GIB) for k in range(16)]
    placed = P.estimate(ask(*nodes, profile=stack(48, 10_000_000), nodes={"max": 16}, train={"batch_size": 256}))
    assert len(set(placed.nodes)) == len(placed.nodes) >= 8
    assert math.isfinite(placed.cost.seconds)


def test_a_measured_step_is_that_of_the_same_stages_on_the_same_nodes() -> None:
    inputs = ask(node("slow", 10.0), node("fast", 20.0), profile=stack(12), **pipeline())
    placed = P.estimate(inputs)
    first, second = placed.placements
    turned = (replace(first, node_id=second.node_id), replace(second, node_id=first.node_id))
    same = combination(inputs, P.name, placed)
    assert combination(inputs, P.name, replace(placed, placements=(second, first))) == same, "in whatever order"
    assert combination(inputs, P.name, replace(placed, placements=turned)) != same
    layout = replace(layout_of(placed), stages=((0, 1), (1, 12)))
    assert combination(inputs, P.name, replace(placed, layout=layout)) != same


def test_a_measured_step_is_that_of_the_same_replicas_whichever_comes_first() -> None:
    inputs = ask(
        node("a"), node("b"), node("c"), node("d"), profile=stack(12), **pipeline({"stages": 2, "replicas": 2})
    )
    placed = P.estimate(inputs)
    swapped = tuple(replace(each, replica=1 - each.replica) for each in placed.placements)
    assert {each.replica for each in swapped} == {0, 1}
    assert combination(inputs, P.name, replace(placed, placements=swapped)) == combination(inputs, P.name, placed)
