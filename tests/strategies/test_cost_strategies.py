from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from protos.capacity import Capacity, DeviceInfo, FamilyRate, LinkEstimate, TrustedNetwork
from protos.errors import NoPlacement
from protos.ids import NodeId
from protos.jobspec import BUILT_STRATEGIES, StrategyName, parse
from protos.model import Complexity, Family, LayerProfile, ModelProfile, Requirements
from protos.plan import ClusterView, DataProfile, NodeView
from protos.states import Activity, Eligibility, NodeLink
from strategies.base import Inputs, Strategy
from strategies.data_parallel import DataParallel
from strategies.links import link_between, median_rtt_s, trusted_groups
from strategies.model_parallel import ModelParallel
from strategies.partition import RankSpeed, alike, split_batch
from strategies.registry import BUILT
from strategies.single_node import SingleNode

GIB = 1024**3
LAN = "192.168.1.0/24"


def node(name: str, gflops: float = 10.0, **changes: Any) -> NodeView:
    lan = changes.pop("lan", LAN)
    activity = changes.pop("activity", Activity.IDLE)
    known: dict[str, Any] = {
        "hostname": name, "machine_id": name, "platform": "", "python": "", "cores": 4.0, "cores_total": 4,
        "memory_bytes": 8 * GIB, "memory_total_bytes": 8 * GIB, "disk_free_bytes": 0,
        "families": {"matmul": FamilyRate(gflops * 1e9, 0.001)},
        "networks": (TrustedNetwork("loopback", "lo", "127.0.0.1"),)
        + ((TrustedNetwork(lan, "eth0", "192.168.1.2"),) if lan else ()),
        "rtt_s": 0.0005, "bandwidth_bytes_per_s": 117e6,
    }  # fmt: skip
    capacity = Capacity(**(known | changes))
    return NodeView(NodeId(name), name, capacity, NodeLink.CONNECTED, Eligibility.OK, activity)


def model(parameters: int = 1_000_000, flops: float = 1e9, activation: float = 1e5) -> ModelProfile:
    layer = LayerProfile("layer", "Linear", parameters, flops, activation, 4e3, (10,))
    return ModelProfile(
        "pytorch", "source", Family.MLP, "", parameters, 4 * parameters, True, ("float32",), (64,), Complexity.MEDIUM,
        (layer,), Requirements(1, GIB, 0, 1, "layers"), 1.0,
    )  # fmt: skip


def ask(*nodes: NodeView, profile: ModelProfile | None = None, data: DataProfile | None = None, **parts: Any) -> Inputs:
    holders = frozenset(NodeId(name) for name in parts.pop("holders", ()))
    links = parts.pop("links", {})
    document = {"model": {"source": "m.py:f"}, "data": {"source": "d.npz"}, "train": {"batch_size": 64}, **parts}
    profile = profile or model()
    return Inputs(parse(document), profile, data or DataProfile("", 64_000, 10**6), ClusterView(nodes, links), holders)


def test_the_strategies_that_are_built_are_registered_under_their_names() -> None:
    assert set(BUILT) == set(StrategyName) - {StrategyName.FEDERATED} == set(BUILT_STRATEGIES)
    assert all(strategy.name is name for name, strategy in BUILT.items())


def test_single_node_takes_the_node_that_finishes_first_not_the_one_with_most_flops() -> None:
    """The fastest processor waits longest for its data."""
    data = DataProfile("", 64_000, 10 * 10**9)
    far = node("far", 12.0, bandwidth_bytes_per_s=1e6)
    placed = SingleNode().estimate(ask(node("slow", 1.0), node("near", 10.0), far, data=data))
    assert placed.nodes == ("near",)
    assert placed.cost.seconds == pytest.approx(
        sum(placed.cost.terms[name] for name in ("startup", "transfer", "evaluation")) + 1000 * placed.cost.step_s
    )


def test_data_parallel_cuts_the_batch_by_speed_fastest_first() -> None:
    inputs = ask(node("slow", 10.0), node("fast", 30.0))
    placed = DataParallel().estimate(inputs)
    assert placed.nodes == ("fast", "slow")
    assert [placement.samples for placement in placed.placements] == [48, 16]
    assert placed.network == LAN
    subtasks = DataParallel().decompose(inputs, placed)
    assert [subtask.data_range for subtask in subtasks] == [(0, 48), (48, 64)]
    assert {subtask.synchronization for subtask in subtasks} == {"all_reduce"}
    assert subtasks[0].output_shape == (10,)


def test_a_node_that_would_slow_the_others_is_left_out() -> None:
    """A third node behind a slow link costs more in every all-reduce than its share of the work saves."""
    inputs = ask(node("a", 30.0), node("b", 29.0), node("c", 5.0, bandwidth_bytes_per_s=1e5))
    assert DataParallel().estimate(inputs).nodes == ("a", "b")


def test_a_hopeless_node_is_left_out_by_the_choice_but_works_when_the_job_file_names_the_strategy() -> None:
    nodes = (node("a", 30.0), node("b", 0.01))
    free = DataParallel()
    assert free.feasible(ask(*nodes)) == (
        "one node would get every sample: the others are too slow to help with this batch size",
    )
    forced = ask(*nodes, strategy="data_parallel")
    assert free.feasible(forced) == ()
    assert [placement.samples for placement in free.estimate(forced).placements] == [63, 1]


def test_nodes_of_one_machine_use_loopback_without_being_asked() -> None:
    inputs = ask(node("a", machine_id="m", lan=None), node("b", machine_id="m", lan=None))
    assert DataParallel().estimate(inputs).network == "loopback"


def test_two_machines_without_a_common_network_are_masked_with_the_flag_that_allows_it() -> None:
    inputs = ask(node("a", lan=None), node("b", lan=None))
    (reason,) = DataParallel().feasible(inputs)
    assert "hive-node start --trusted-lan IFACE|CIDR" in reason
    with pytest.raises(NoPlacement, match="trusted network"):
        DataParallel().estimate(inputs)


def test_loopback_of_different_machines_is_not_a_common_network() -> None:
    nodes = [node("a", lan="127.0.0.0/8"), node("b", lan="127.0.0.0/8")]
    assert trusted_groups(nodes) == ()


def test_one_usable_node_is_not_enough_and_the_others_are_named_with_their_state() -> None:
    (reason,) = DataParallel().feasible(ask(node("a"), node("b", activity=Activity.BUSY)))
    assert reason == "needs 2 usable nodes, there is 1 (b is BUSY)"
    (reason,) = DataParallel().feasible(ask())
    assert reason == "needs 2 usable nodes, there are none"


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ({"require": {"names": ["a"]}}, "b is not among nodes.require.names"),
        ({"require": {"gpu": True}}, "b has no GPU"),
        ({"require": {"memory_bytes": 9 * GIB}}, "b grants 8.0 GiB"),
    ],
)
def test_what_the_job_requires_excludes_nodes_with_a_reason(nodes: dict[str, Any], said: str) -> None:
    gpu = DeviceInfo("cuda", 0, "T4", 16 * GIB, 16 * GIB, 0.0)
    big = node("a", memory_bytes=16 * GIB, gpus=(gpu,))
    inputs = ask(big, node("b"), nodes=nodes)
    assert [eligible.name for eligible in inputs.eligible] == ["a"]
    assert said in DataParallel().feasible(inputs)[0]


def test_nodes_min_and_max_bound_the_group() -> None:
    nodes = [node(name, 10.0) for name in "abcd"]
    assert len(DataParallel().estimate(ask(*nodes)).nodes) == 4
    assert len(DataParallel().estimate(ask(*nodes, nodes={"max": 2})).nodes) == 2
    slow = [node("a", 100.0), node("b", 100.0), node("c", 5.0, bandwidth_bytes_per_s=1e6)]
    assert len(DataParallel().estimate(ask(*slow, nodes={"min": 3})).nodes) == 3
    assert SingleNode().feasible(ask(*nodes, nodes={"min": 2})) == ("nodes.min asks for 2 nodes",)
    assert DataParallel().feasible(ask(*nodes, nodes={"max": 1})) == ("nodes.max is 1",)
    assert "needs 5 usable nodes" in DataParallel().feasible(ask(*nodes, nodes={"min": 5}))[0]


def test_accumulation_is_chosen_when_memory_asks_for_it() -> None:
    """64 samples of 100 MB do not fit in 85 % of 2 GiB less 250 MiB; 12 do."""
    inputs = ask(node("a", memory_bytes=2 * GIB), profile=model(activation=1e8))
    placed = SingleNode().estimate(inputs)
    assert placed.accumulate == (6,)
    assert placed.cost.peak_memory_bytes <= 0.85 * 2 * GIB
    assert SingleNode().decompose(inputs, placed)[0].accumulate == 6


def test_an_accumulation_the_job_sets_is_kept_or_refused() -> None:
    train = {"batch_size": 64, "accumulate": 2}
    assert SingleNode().estimate(ask(node("a"), train=train)).accumulate == (2,)
    tight = ask(node("a", memory_bytes=2 * GIB), profile=model(activation=1e8), train=train)
    assert "for 32 samples at a time" in SingleNode().feasible(tight)[0]


def test_a_model_over_the_memory_of_every_node_is_masked_with_the_numbers() -> None:
    inputs = ask(node("a", memory_bytes=GIB), node("b", memory_bytes=2 * GIB), profile=model(parameters=10**9))
    (reason,) = SingleNode().feasible(inputs)
    assert "needs 15.2 GiB for one sample at a time, 85 % of what b grants is 1.7 GiB" in reason
    assert "needs 18.9 GiB" in DataParallel().feasible(inputs)[0]


def test_memory_of_a_small_node_pushes_its_samples_to_the_others() -> None:
    """With a fixed accumulation the memory bounds a rank's slice; with auto it cuts the slice in pieces."""
    nodes = (node("small", memory_bytes=GIB), node("large", memory_bytes=16 * GIB))
    profile = model(activation=1e8)
    fixed = DataParallel().estimate(ask(*nodes, profile=profile, train={"batch_size": 64, "accumulate": 1}))
    assert [p.samples for p in fixed.placements] == [60, 4]
    auto = DataParallel().estimate(ask(*nodes, profile=profile))
    assert max(auto.accumulate) > 1
    assert max(p.samples for p in auto.placements) <= 33


def test_a_holder_of_the_newest_state_takes_part() -> None:
    nodes = [node("a", 50.0), node("b", 50.0), node("c", 5.0, bandwidth_bytes_per_s=1e6)]
    assert "c" not in DataParallel().estimate(ask(*nodes)).nodes
    assert "c" in DataParallel().estimate(ask(*nodes, holders=["c"])).nodes
    assert SingleNode().estimate(ask(*nodes, holders=["c"])).nodes == ("c",)
    assert SingleNode().estimate(ask(*nodes, holders=["gone"])).nodes[0] in ("a", "b")


def test_a_group_that_cannot_reach_the_newest_state_is_no_group() -> None:
    inputs = ask(node("a"), node("b"), node("c", lan=None), holders=["c"])
    assert DataParallel().feasible(inputs) == (
        "no trusted network reaches a node that has the newest state of the job",
    )


def test_a_model_that_cannot_be_trained_is_refused_with_its_own_reason() -> None:
    profile = replace(model(), trainable=False, why_not="GGUF is for inference")
    for strategy in BUILT.values():
        assert strategy.feasible(ask(node("a"), node("b"), profile=profile)) == ("GGUF is for inference",)


def test_unmeasured_links_fall_back_to_what_is_known_and_measured_ones_win() -> None:
    a, b, c = node("a", rtt_s=0.004), node("b", rtt_s=0.001, bandwidth_bytes_per_s=5e6), node("c", machine_id="b")
    assert (link_between(ClusterView(()), a, b).rtt_s, link_between(ClusterView(()), a, b).bytes_per_s) == (0.004, 5e6)
    assert link_between(ClusterView(()), b, c).rtt_s == 0.0001
    measured = ClusterView((), {(NodeId("a"), NodeId("b")): LinkEstimate(0.02, 1e6, LAN)})
    assert link_between(measured, b, a).bytes_per_s == 1e6
    unknown = [node("x", rtt_s=None, bandwidth_bytes_per_s=None), node("y", rtt_s=None, bandwidth_bytes_per_s=None)]
    assert link_between(ClusterView(()), unknown[0], unknown[1]).bytes_per_s == 117e6
    capped = node("d", max_upload_bytes_per_s=1e5)
    assert link_between(ClusterView(()), a, capped).bytes_per_s == 1e5
    assert median_rtt_s(ClusterView(()), [a]) == 0.0
    assert median_rtt_s(measured, [a, b]) == 0.02


@pytest.mark.parametrize(
    ("strategy", "named"),
    [(DataParallel(), "data_parallel"), (ModelParallel(), {"model_parallel": {"kind": "sharded"}})],
)
def test_a_quick_node_behind_a_slow_link_is_left_out(strategy: Strategy, named: Any) -> None:
    """Every prefix of the nodes by speed would hold it."""
    nodes = [node("quick", gflops=14.0), node("b"), node("c"), node("d")]
    links = {
        (a.node_id, b.node_id): LinkEstimate(0.001, 2.5e6 if "quick" in (a.name, b.name) else 117e6, LAN)
        for a, b in combinations(sorted(nodes, key=lambda each: each.node_id), 2)
    }
    inputs = ask(*nodes, links=links, strategy=named, profile=model(10_000_000))
    assert not strategy.feasible(inputs)
    assert set(strategy.estimate(inputs).nodes) == {NodeId(name) for name in "bcd"}


def test_equal_machines_get_equal_slices_although_their_measurements_differ_a_little() -> None:
    near = [RankSpeed(0.001, 1.00e-4, 1000), RankSpeed(0.001, 1.08e-4, 1000)]
    far = [RankSpeed(0.001, 1.00e-4, 1000), RankSpeed(0.001, 1.60e-4, 1000)]
    assert split_batch(alike(near, 64), 64) == (32, 32)
    assert split_batch(alike(far, 64), 64) != (32, 32)
