from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.capacity import Capacity, FamilyRate, Rate
from protos.ids import NodeId
from protos.jobspec import OptimizerSpec, TrainSpec
from protos.model import Complexity, Family, LayerProfile, ModelProfile, Requirements
from protos.plan import DataProfile, NodeView
from protos.states import Activity, Eligibility, NodeLink
from strategies import cost, memory

GIB = 1024**3


def capacity(**changes: Any) -> Capacity:
    known: dict[str, Any] = {
        "hostname": "h", "machine_id": "m", "platform": "linux", "python": "3.11", "cores": 4.0, "cores_total": 8,
        "memory_bytes": 4 * GIB, "memory_total_bytes": 8 * GIB, "disk_free_bytes": 0,
        "families": {"matmul": FamilyRate(1e10, 0.001), "conv": FamilyRate(5e9, 0.002), "tiny": FamilyRate(1e8, 1e-4)},
        "memory_bandwidth": Rate(1e10, 1e10, 0.0),
    }  # fmt: skip
    return Capacity(**(known | changes))


def profile(*layers: LayerProfile, parameters: int = 1000, source: str = "layers") -> ModelProfile:
    need = Requirements(2.0, 4 * GIB, 0, 0.5, source)
    return ModelProfile(
        "pytorch", "source", Family.MLP, "", parameters, 4 * parameters, True, ("float32",), (8,), Complexity.SMALL,
        layers, need, 1.0,
    )  # fmt: skip


def layer(kind: str, flops: float, activation: float = 0.0, output: float = 0.0) -> LayerProfile:
    return LayerProfile(kind, kind, 0, flops, activation, output)


def test_a_step_is_three_forward_passes_at_the_rate_of_each_family_plus_what_is_fixed() -> None:
    """a + 3 f b / F: 3 * (1e9 / 1e10 + 1e9 / 5e9) = 0.9 s a sample; the convolutions take most, so theirs is a."""
    node = cost.speed(profile(layer("Linear", 1e9), layer("Conv2d", 1e9)), capacity(), TrainSpec())
    assert node.seconds_per_sample == pytest.approx(0.9)
    weights_s = 12 * 1000 / 1e10  # read forward and backward, the gradient written
    assert node.overhead_s == pytest.approx(0.002 + weights_s)
    assert node.optimizer_s == pytest.approx(1000 * 28 / 1e10)  # Adam moves 28 B a parameter
    assert node.step_s(2, 3) == pytest.approx(3 * (0.002 + weights_s) + 1.8 + node.optimizer_s)


def test_a_tiny_model_runs_at_the_rate_measured_for_tiny_models() -> None:
    assert cost.speed(profile(layer("Linear", 1e4)), capacity(), TrainSpec()).seconds_per_sample == pytest.approx(3e-4)


@pytest.mark.parametrize(
    ("kind", "family"),
    [("Linear", "matmul"), ("Conv2d", "conv"), ("ConvTranspose1d", "conv"), ("LSTM", "rnn"), ("Embedding", "embedding"),
     ("MultiheadAttention", "matmul")],
)  # fmt: skip
def test_a_layer_runs_at_the_rate_of_its_family(kind: str, family: str) -> None:
    assert cost.layer_family(layer(kind, 1.0)) == family


def test_an_unmeasured_node_still_has_a_speed() -> None:
    assert cost.family_rate(capacity(families={}, flops={"fp32": Rate(2e9, 1e9, 0.1)}), "conv").flops == 5e8
    assert cost.family_rate(capacity(families={}, cores=2.0), "conv").flops == 8e9
    assert cost.family_rate(capacity(), "rnn").flops == 1e10


def test_a_ring_all_reduce_is_its_closed_form() -> None:
    assert cost.all_reduce_s(1, 1e9, 1.0, 1.0, gpu=False) == 0.0
    assert cost.all_reduce_s(4, 25e6, 0.0, 12.5e6, gpu=False) == pytest.approx(3.0)  # 25 MB over 100 Mbit/s
    assert cost.all_reduce_s(4, 1e6, 0.02, 1e12, gpu=False) == pytest.approx(6 * 0.01, rel=1e-3)
    assert cost.all_reduce_bytes(4, 100e6, gpu=False) == pytest.approx(4 * 150e6)


def test_what_is_small_is_gathered_and_sends_little_more_than_a_ring() -> None:
    assert cost.gathered(2, 200_000) and not cost.gathered(2, 300_000)
    assert cost.gathered(4, 20_000) and not cost.gathered(4, 40_000)
    sent = cost.all_reduce_bytes(2, 200_000, gpu=False)
    assert sent == 2 * 200_000, "of two ranks each sends what it would around a ring"
    assert cost.all_reduce_bytes(4, 100.0, gpu=False) == 4 * 300.0
    assert cost.all_reduce_s(4, 100.0, 0.02, 1e12, gpu=False) == pytest.approx(3 * 0.01)
    small_s, large_s = (cost.group_step_s(4, size, capacity(), gpu=False) for size in (1e3, 1e6))
    assert small_s < large_s
    assert large_s > cost.group_step_s(2, 1e6, capacity(), gpu=False)


def test_gpus_sum_also_what_is_small_around_a_ring() -> None:
    assert cost.all_reduce_s(4, 100.0, 0.02, 1e12, gpu=True) == pytest.approx(6 * 0.01)
    assert cost.all_reduce_bytes(4, 100.0, gpu=True) == 4 * 150.0
    assert cost.group_step_s(4, 1e3, capacity(), gpu=True) == cost.group_step_s(4, 1e6, capacity(), gpu=True)


@pytest.mark.parametrize(
    ("computes_s", "waits_s", "mechanism", "step_s"),
    [
        (0.01, 0.005, "cgroup1", 0.040),
        (0.02, 0.020, "cgroup1", 0.081),
        (0.05, 0.030, "cgroup1", 0.201),
        (0.05, 0.100, "cgroup1", 0.260),
        (0.15, 0.100, "cgroup1", 0.655),
        (0.15, 0.300, "cgroup1", 0.852),
        (0.40, 0.200, "cgroup1", 1.765),
        (0.05, 0.100, "duty_cycle", 0.198),
        (0.15, 0.100, "duty_cycle", 0.599),
        (0.15, 0.300, "duty_cycle", 0.605),
    ],
)
def test_a_quota_that_was_not_used_while_waiting_is_used_afterwards(
    computes_s: float, waits_s: float, mechanism: str, step_s: float
) -> None:
    """Measured with a process that computes and sleeps in turn under a quarter of a core."""
    node = capacity(cores=0.25, cpu_mechanism=mechanism)
    predicted_s = cost.in_group_s(computes_s / 0.25, waits_s, 0.0, node, overlap=1.0)
    assert predicted_s == pytest.approx(step_s, rel=0.1)


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(0, 1e3), st.floats(0.01, 8), st.floats(1, 10))
def test_a_cap_never_gives_more_than_it_grants_nor_takes_more_than_waiting_for_everything(
    compute_s: float, network_s: float, carrying_s: float, cores: float, overlap: float
) -> None:
    step_s = cost.in_group_s(compute_s, network_s, carrying_s, capacity(cores=cores), overlap)
    assert step_s >= max(compute_s + carrying_s, network_s) * (1 - 1e-9)
    assert step_s <= max(compute_s + carrying_s, cost.mix(compute_s, network_s, overlap)) * (1 + 1e-9)
    whole = cost.in_group_s(compute_s, network_s, 0.0, capacity(cores=2.0), overlap)
    assert whole == pytest.approx(max(compute_s, cost.mix(compute_s, network_s, overlap)))


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(1, 10))
def test_overlap_lies_between_full_and_none(compute_s: float, network_s: float, overlap: float) -> None:
    mixed = cost.mix(compute_s, network_s, overlap)
    assert max(compute_s, network_s) * (1 - 1e-9) <= mixed <= (compute_s + network_s) * (1 + 1e-9)


def test_overlap_of_nothing_is_nothing() -> None:
    assert cost.mix(0.0, 0.0) == 0.0
    assert cost.mix(1.0, 2.0, 1.0) == pytest.approx(3.0)


def test_fp16_is_taken_on_a_slow_link_and_not_over_loopback() -> None:
    slow = cost.synchronise(2, 10_000_000, 0.1, 0.001, 12.5e6, "auto", gpu=False)
    fast = cost.synchronise(2, 10_000_000, 0.1, 0.0001, 1.5e9, "auto", gpu=False)
    assert (slow.compression, fast.compression) == ("fp16", "none")
    assert slow.bytes == fast.bytes / 2
    assert fast.codec_s == 0.0


def test_a_compression_the_job_asks_for_is_taken_as_asked() -> None:
    assert cost.synchronise(2, 10_000_000, 0.1, 0.001, 12.5e6, "none", gpu=False).compression == "none"
    assert cost.synchronise(2, 10_000_000, 0.1, 0.0001, 1.5e9, "fp16", gpu=False).compression == "fp16"


def test_steps_count_the_small_last_batch_of_every_epoch() -> None:
    data = DataProfile("", 1001, 0)
    assert cost.steps_of(TrainSpec(batch_size=100, epochs=3), data) == 33
    assert cost.steps_of(TrainSpec(batch_size=100, steps=7), data) == 7
    assert cost.steps_of(TrainSpec(batch_size=100), DataProfile("", None, 10**6)) is None
    assert cost.assumed_steps(profile(), TrainSpec(batch_size=100), DataProfile("", None, 320_000)) == 100


def test_evaluation_is_a_third_of_training_per_sample_as_often_as_asked() -> None:
    node = cost.Speed(0.0, 0.003, 0.0)
    data = DataProfile("", 1000, 0, test_rows=100)
    each = 0.1
    for when, times in (("never", 0), ("end", 1), ("epoch", 4), (5, 8)):
        train = TrainSpec(batch_size=100, epochs=4, evaluate_every=when)
        assert cost.evaluation_s(profile(), train, data, [(node, 1.0)]) == pytest.approx(times * each)
        halves = [(node, 0.5), (node, 0.5)]
        assert cost.evaluation_s(profile(), train, data, halves) == pytest.approx(times * each / 2)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [({"name": "adamw"}, 16), ({"name": "adam"}, 16), ({"name": "sgd"}, 8), ({"name": "sgd", "momentum": 0.9}, 12),
     ({"name": "rmsprop"}, 12), ({"name": "adagrad"}, 12), ({"name": "adam", "amsgrad": True}, 20)],
)  # fmt: skip
def test_memory_per_parameter_follows_the_optimizer(optimizer: dict[str, Any], expected: int) -> None:
    assert memory.bytes_per_parameter(OptimizerSpec(**optimizer)) == expected


def test_a_pass_through_many_layers_costs_more_than_one_through_few() -> None:
    """Overheads are measured with a few layers of a family: a pass through twice as many costs twice as much."""
    few, many = (
        cost.speed(profile(*[layer("Linear", 1e9)] * count), capacity(), TrainSpec()).overhead_s
        for count in (cost.CALIBRATED_LAYERS["matmul"], 2 * cost.CALIBRATED_LAYERS["matmul"])
    )
    weights_s = 12 * 1000 / 1e10
    assert many - weights_s == pytest.approx(2 * (few - weights_s))


def test_data_parallel_keeps_four_more_bytes_a_parameter() -> None:
    model, adam = profile(layer("Linear", 1.0), parameters=10**6), OptimizerSpec()
    more = memory.worker_bytes(model, adam, 1, 2) - memory.worker_bytes(model, adam, 1, 1)
    assert more == 4 * 10**6 + memory.GROUP_BYTES
    assert memory.worker_bytes(model, adam, 1, 8) == memory.worker_bytes(model, adam, 1, 2)


@given(
    st.integers(1, 10**8),
    st.floats(0, 1e7),
    st.integers(1, 512),
    st.integers(10**8, 10**10),
    st.sampled_from([1.0, 1.0, 2.5]),
)
def test_the_largest_micro_batch_fits_and_one_more_would_not(
    parameters: int, activation: float, wanted: int, granted: int, factor: float
) -> None:
    model, adam = profile(layer("Linear", 1.0, activation), parameters=parameters), OptimizerSpec()
    node = NodeView(
        NodeId("n"), "n", capacity(memory_bytes=granted), NodeLink.CONNECTED, Eligibility.OK, Activity.IDLE,
        memory_factor=factor,
    )  # fmt: skip
    largest = memory.largest_micro_batch(model, adam, node, 1, wanted)
    budget = memory.budget_bytes(node)
    assert budget <= memory.SHARE * granted
    assert memory.expected_bytes(int(budget), 1, factor) <= max(memory.SHARE * granted, budget) + 1
    assert 0 <= largest <= wanted
    if largest:
        assert memory.worker_bytes(model, adam, largest, 1, micro_batches=1 if largest == wanted else 2) <= budget + 1
    if largest < wanted:
        assert memory.worker_bytes(model, adam, largest + 1, 1, micro_batches=2) > budget - 1


def test_unknown_layers_need_what_the_table_says() -> None:
    needs = [memory.worker_bytes(profile(source=source), OptimizerSpec(), 1, 1) for source in ("table", "layers")]
    assert needs[0] >= 4 * GIB > GIB > needs[1]
