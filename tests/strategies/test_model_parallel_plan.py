"""A model shared among nodes as it is planned: shards that follow memory, layers cut only over short links."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_cost_ranks import with_gpus
from test_cost_strategies import GIB, ask, node

from protos.model import Complexity, Family, LayerProfile, ModelProfile, Requirements, TensorCut
from strategies.base import Inputs, PlacedEstimate
from strategies.blocks import blocks_of, gathered_parameters
from strategies.memory import recomputed_sample_bytes, sample_bytes, shard_reserve_bytes
from strategies.model_parallel import ModelParallel
from strategies.shard_estimate import GATHERED_BYTES
from strategies.single_node import SingleNode

M = ModelParallel()


def transformer(
    blocks: int = 10, block: int = 80_000_000, embedding: int = 10_000_000, activation: float = 1e5, flops: float = 1e9
) -> ModelProfile:
    layers = [LayerProfile("tok", "Embedding", embedding, 0.0, 1e4, 4e3, (10,))]
    for k in range(blocks):
        for part in ("fc", "out"):
            layers.append(
                LayerProfile(f"h.{k}.{part}", "Linear", block // 2, flops, activation, 4e3, (10,))
            )  # fmt: skip
    total = embedding + blocks * block
    passes = 4e3 * 2 * blocks  # a sum forward and one backward for each pair
    cuts = tuple(
        TensorCut(ranks, 2 * blocks, blocks * block, 2 * blocks * flops, 2 * blocks, passes, 0, 0.0)
        for ranks in (2, 4, 8)
    )
    return ModelProfile(
        "pytorch", "source", Family.TRANSFORMER, "", total, 4 * total, True, ("float32",), (64,), Complexity.LARGE,
        tuple(layers), Requirements(1, GIB, 0, 1, "layers"), 1.0, tensor_cuts=cuts, why_not_tensor="",
    )  # fmt: skip


def forced(kind: str | None = "sharded", ranks: int | None = None, **parts: Any) -> dict[str, Any]:
    given = {key: value for key, value in {"kind": kind, "ranks": ranks}.items() if value is not None}
    return {"strategy": {"model_parallel": given}, **parts}


def reason(inputs: Inputs) -> str:
    return "; ".join(M.feasible(inputs))


def ranks_by_node(placed: PlacedEstimate) -> dict[str, int]:
    return {name: placed.nodes.count(name) for name in placed.nodes}


def test_blocks_are_members_of_lists_and_the_rest_is_the_root() -> None:
    blocks, root = blocks_of(transformer(3))
    assert [block.name for block in blocks] == ["h.0", "h.1", "h.2"]
    assert [layer.name for layer in root] == ["tok"]
    assert gathered_parameters(transformer(3)) == 2 * 80_000_000
    tied = transformer(3)
    head = LayerProfile("head", "Linear", 0, 1e9, 1e5, 4e3, (10,), None, 10_000_000)
    tied = replace(tied, layers=(*tied.layers, head))
    assert gathered_parameters(tied) == 10_000_000 + 2 * 80_000_000, "a tensor used twice stays gathered"
    layers = tuple(replace(layer, name=name) for layer, name in zip(transformer(1).layers, "abc", strict=True))
    assert [block.name for block in blocks_of(replace(transformer(1), layers=layers))[0]] == ["a", "b", "c"]


def test_a_model_larger_than_any_node_is_sharded_over_all_of_them() -> None:
    """810 million parameters with Adam are 12.1 GiB; each node grants 8 GiB."""
    placed = M.estimate(ask(*(node(name) for name in "abc"), profile=transformer(), **forced()))
    assert placed.layout is not None and placed.layout.sharded
    assert len(placed.placements) >= 2
    assert all(need <= 0.85 * 8 * GIB for need in placed.cost.memory_bytes.values())
    assert sum(placement.samples for placement in placed.placements) == 64
    assert [placement.replica for placement in placed.placements] == list(range(len(placed.placements)))
    assert placed.cost.step_s == pytest.approx(
        sum(placed.cost.terms[name] for name in ("compute", "sync", "optimizer"))
    )


def test_memory_of_a_shard_is_exact() -> None:
    profile = transformer(10, 60_000_000)
    placed = M.estimate(ask(node("a"), node("b"), profile=profile, **forced(ranks=2)))
    fixed = 16 * profile.parameters / 2 + GATHERED_BYTES * 120_000_000 + shard_reserve_bytes()
    assert set(placed.accumulate) == {1}
    assert placed.cost.memory_bytes["a"] == pytest.approx(fixed + 32 * sample_bytes(profile), rel=1e-6)


def test_a_node_with_more_memory_runs_several_ranks() -> None:
    """In even thirds the small node would not hold its shard: the large one takes more of them."""
    nodes = (node("small", memory_bytes=6 * GIB), node("large", memory_bytes=32 * GIB))
    placed = M.estimate(ask(*nodes, profile=transformer(), **forced()))
    held = ranks_by_node(placed)
    assert held["small"] == 1
    assert held["large"] >= 2
    assert placed.cost.memory_bytes["small"] <= 0.85 * 6 * GIB
    assert placed.cost.memory_bytes["large"] > placed.cost.memory_bytes["small"]
    subtasks = M.decompose(ask(*nodes, profile=transformer(), **forced()), placed)
    assert {subtask.device for subtask in subtasks} == {0}, "they share the node's processors"
    assert {subtask.synchronization for subtask in subtasks} == {"shards"}


def test_ranks_of_one_node_share_its_speed() -> None:
    nodes = (node("a"), node("b"))
    two, four = (M.estimate(ask(*nodes, profile=transformer(10, 50_000_000), **forced(ranks=k))) for k in (2, 4))
    assert ranks_by_node(four) == {"a": 2, "b": 2}
    assert four.cost.terms["compute"] == pytest.approx(two.cost.terms["compute"], rel=0.05)


def test_all_ranks_cut_their_samples_into_the_same_number_of_pieces() -> None:
    nodes = (node("a", 10.0), node("b", 30.0))
    placed = M.estimate(ask(*nodes, profile=transformer(10, 60_000_000, activation=2e6), **forced(ranks=2)))
    assert len(set(placed.accumulate)) == 1 and placed.accumulate[0] > 1
    assert all(placement.samples >= placed.accumulate[0] for placement in placed.placements)
    assert all(need <= 0.85 * 8 * GIB for need in placed.cost.memory_bytes.values())
    assert {p.node_id: p.samples for p in placed.placements}["b"] > 40


def test_where_every_node_holds_the_model_it_is_left_to_data_parallel_unless_named() -> None:
    small = replace(transformer(2, 1_000_000, 1000), tensor_cuts=(), why_not_tensor="it is a cnn model")
    nodes = (node("a"), node("b"))
    assert "data_parallel does the same work" in reason(ask(*nodes, profile=small))
    assert M.feasible(ask(*nodes, profile=small, **forced())) == ()


def test_layers_are_cut_where_round_trips_are_short_whether_or_not_every_node_holds_the_model() -> None:
    wide = transformer(4, 20_000_000, 1000, flops=1e8)
    nodes = (node("a"), node("b"))
    free = M.estimate(ask(*nodes, profile=wide))
    assert free.layout is not None and free.layout.tensor == 2
    placed = M.estimate(ask(*nodes, profile=wide, **forced("tensor")))
    assert placed.layout is not None and placed.layout.tensor == 2
    assert [placement.samples for placement in placed.placements] == [64, 64]
    subtasks = M.decompose(ask(*nodes, profile=wide, **forced("tensor")), placed)
    assert [(each.data_range, each.replica) for each in subtasks] == [((0, 64), 0), ((0, 64), 0)]
    assert [placed.layout.replica_of(rank) for rank in (0, 1)] == [0, 0]
    embedding = 1000  # held whole by both, its gradient averaged
    assert placed.cost.bytes_per_step == pytest.approx(2 * (64 * 4 * 2 * 4e3 + 4 * embedding))
    far = tuple(node(name, rtt_s=0.004) for name in "ab")
    said = reason(ask(*far, profile=wide))
    assert "data_parallel does the same work" in said and "a round trip of 4.0 ms is over 1 ms" in said
    assert "a round trip of 4.0 ms is over 1 ms" in reason(ask(*far, profile=wide, **forced("tensor")))


def test_a_model_whose_layers_cannot_be_cut_says_why() -> None:
    whole = replace(transformer(), tensor_cuts=(), why_not_tensor="it is an LSTM")
    assert reason(ask(node("a"), node("b"), profile=whole, **forced("tensor"))) == "tensor parallel: it is an LSTM"
    odd = reason(ask(node("a"), node("b"), node("c"), profile=transformer(), **forced("tensor", 3)))
    assert odd == "tensor parallel: no layer can be cut among 3 ranks; among 2, 4, 8 it can"


def test_an_exported_program_has_no_modules_to_shard() -> None:
    exported = replace(transformer(), format="pytorch_export")
    assert "pipeline_parallel can cut it" in reason(ask(node("a"), node("b"), profile=exported, **forced()))


def test_what_does_not_fit_is_said_with_numbers() -> None:
    nodes = (node("a"), node("b"))
    huge = reason(ask(*nodes, profile=transformer(40, 200_000_000)))
    assert "for each of 8 shards" in huge and "85% of what a grants is 6.8 GiB" in huge
    assert "run 8 at most" in reason(ask(*nodes, profile=transformer(), **forced(ranks=9)))
    few = reason(ask(*nodes, profile=transformer(), train={"batch_size": 1}, **forced()))
    assert few == "a batch of 1 samples has none for each of 2 ranks"
    assert "--trusted-lan" in reason(ask(node("a", lan=None), node("b", lan=None), profile=transformer()))


def test_gpus_are_a_rank_each_with_memory_of_their_own() -> None:
    placed = M.estimate(ask(with_gpus("box", 2, lan=None), profile=transformer(10, 120_000_000), **forced()))
    assert placed.nodes == ("box", "box")
    assert placed.cost.memory_bytes["box"] <= 0.85 * 16 * GIB
    assert placed.links == (), "no link between nodes is used"


def test_a_holder_of_the_newest_state_takes_part() -> None:
    nodes = [node("a", 50.0), node("b", 50.0), node("c", 0.1)]
    inputs = ask(*nodes, profile=transformer(), holders=["c"], nodes={"max": 2})
    assert "c" in M.estimate(inputs).nodes


def test_activations_are_computed_again_on_one_node_when_not_one_sample_fits() -> None:
    profile = transformer(10, 1_000_000, 1000, activation=2e8)  # 4 GB of activations for one sample
    assert recomputed_sample_bytes(profile) < sample_bytes(profile) / 5
    roomy, tight = (ask(node("a", memory_bytes=size * GIB), profile=profile) for size in (8, 4))
    plain, again = SingleNode().estimate(roomy), SingleNode().estimate(tight)
    assert plain.layout is None
    assert again.layout is not None and again.layout.checkpoint_activations
    assert again.cost.terms["compute"] > 1.3 * (plain.cost.terms["compute"] - 0.064)
    assert again.cost.peak_memory_bytes <= 0.85 * 4 * GIB
    (reason,) = SingleNode().feasible(ask(node("a", memory_bytes=GIB // 2), profile=profile))
    assert "85 % of what a grants" in reason
