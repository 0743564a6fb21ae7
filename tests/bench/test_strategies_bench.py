"""What the benchmarks of the strategies conclude from what they measure; nothing is timed here."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import strategies
from bench.report import Finding
from bench.runner import options
from bench.strategy_equal_coordinator import EQUAL, AsIfEqual, as_if_equal
from bench.strategy_jobs import GPT_MEDIUM, HYBRID, MODELS, SHARDED, TENSOR, name_of, pipeline, steps_for
from bench.strategy_netns import NETWORKS, NODES, THREE, Row, markdown
from bench.strategy_peers import RIVALS
from bench.strategy_predict import CPUS, Tried, combinations, figures
from bench.strategy_report import Memory, Run, mape, relative_error, run_of
from bench.workloads import Strategy, Workload, write
from coordinator.bundle import bundle
from coordinator.jobfile import read_job
from protos.capacity import Capacity, FamilyRate
from protos.ids import NodeId
from protos.jobspec import JobSpec
from protos.model import Complexity, Family, LayerProfile, ModelProfile, Requirements
from protos.plan import ClusterView, DataProfile, Factors, Learned, NodeView, Work
from protos.states import Activity, Eligibility, NodeLink
from strategies.base import Inputs
from strategies.data_parallel import DataParallel
from strategies.memory import RESERVE_BYTES
from strategies.pipeline_parallel import PipelineParallel

MIB = 1024**2


def report(**changes: Any) -> dict[str, Any]:
    """Two ranks on two nodes, after a first generation that was lost."""
    used = {"samples": 10, "compute_s": 1.0, "sync_s": 0.0, "bytes_sent": 0}
    one = used | {"fence": 2, "rank": 0, "seconds": 2.0, "steps": 10}
    two = used | {"fence": 2, "rank": 1, "seconds": 2.5, "steps": 10}
    memory = {"baseline_memory_bytes": 200 * MIB, "peak_memory_bytes": 300 * MIB}
    subtask = {"accumulate": 1, "layer_range": [0, 4]}
    return {
        "job": {"id": "j-1"},
        "measured": {"step_s": 0.24},
        "plan": {
            "estimate": {
                "step_s": 0.2,
                "memory_bytes": {"n-a": RESERVE_BYTES + 90 * MIB, "n-b": RESERVE_BYTES + 110 * MIB},
            },
            "subtasks": [
                subtask | {"rank": 1, "node_id": "n-b", "data_range": [24, 32]},
                subtask | {"rank": 0, "node_id": "n-a", "data_range": [0, 24]},
            ],
        },
        "nodes": {
            "a": {"attempts": [one | memory | {"fence": 1, "seconds": 99.0}, one | memory]},
            "b": {"attempts": [two | memory]},
        },
    } | changes


def records(*times: float) -> list[dict[str, Any]]:
    return [{"stage": "train", "step": step, "time": time} for step, time in enumerate(times, 1)]


RECORDS = [*records(100.0, 100.25, 100.5), {"stage": "evaluate", "step": 3, "time": 109.0}]


def test_a_step_is_timed_without_the_first_and_without_evaluations() -> None:
    run = run_of(report(), RECORDS)
    assert (run.predicted_s, run.measured_s, run.median_s) == (0.2, 0.25, 0.24)
    assert run.error == pytest.approx(0.2)
    assert run.cut == (("n-a", (0, 24), (0, 4), 1), ("n-b", (24, 32), (0, 4), 1))


def test_memory_is_compared_above_what_the_libraries_take() -> None:
    assert run_of(report(), RECORDS).memory == (Memory("a", 90 * MIB, 100 * MIB), Memory("b", 110 * MIB, 100 * MIB))


def test_ranks_of_one_node_are_added_up() -> None:
    made = report()
    made["plan"]["subtasks"][0]["node_id"] = "n-a"
    made["plan"]["estimate"]["memory_bytes"] = {"n-a": 2 * RESERVE_BYTES + 150 * MIB}
    made["nodes"]["a"]["attempts"] += made["nodes"].pop("b")["attempts"]
    assert run_of(made, RECORDS).memory == (Memory("a", 150 * MIB, 200 * MIB),)


def test_memory_is_that_of_the_last_generation() -> None:
    made = report()
    made["nodes"]["a"]["attempts"][0]["peak_memory_bytes"] = 999 * MIB
    assert run_of(made, RECORDS).memory[0] == Memory("a", 90 * MIB, 100 * MIB)


def test_a_job_of_one_step_has_no_time() -> None:
    with pytest.raises(ValueError, match="j-1: there are no two steps"):
        run_of(report(), records(100.0))


def test_errors_are_relative_to_what_was_measured() -> None:
    assert relative_error(3.0, 2.0) == pytest.approx(0.5)
    assert mape([(1.0, 2.0), (3.0, 2.0), (2.0, 2.0)]) == pytest.approx(100 / 3)
    with pytest.raises(ValueError, match="nothing was measured"):
        relative_error(1.0, 0.0)
    with pytest.raises(ValueError, match="no pairs"):
        mape([])


def runs(*seconds: tuple[float, float]) -> list[Run]:
    memory = (Memory("a", 100 * MIB, 110 * MIB), Memory("b", 1 * MIB, 40 * MIB))
    return [
        Run(predicted, measured, measured, memory, cut=(("n-a", (0, 8), (0, 4), 1),)) for predicted, measured in seconds
    ]


def test_the_first_prediction_is_the_one_made_before_any_job_ran() -> None:
    combination = combinations()[0]
    tried = [Tried(combination, 1.5, runs=runs((1.9, 2.0), (2.2, 2.0), (2.0, 2.5)))]
    found = {figure.name: figure for figure in figures(tried)}
    assert found["step time, planned before any job ran"].value == pytest.approx(25)
    assert found["step time, first run of each"].value == pytest.approx(5)
    assert found["step time, a run beside its repetition"].value == pytest.approx(20)
    learned = found["step time, after one run of each"]
    assert learned.value == pytest.approx(10) and learned.gate is not None
    assert learned.gate.limit == pytest.approx(30), "half as much again as a repetition, where that is more"


def test_a_repetition_that_was_cut_differently_is_none() -> None:
    first, second, third = runs((1.0, 1.0), (1.0, 1.0), (1.0, 2.0))
    other = replace(third, cut=())
    found = {figure.name: figure for figure in figures([Tried(combinations()[0], 1.0, runs=[first, second, other])])}
    assert "step time, a run beside its repetition" not in found
    gate = found["step time, after one run of each"].gate
    assert gate is not None and gate.limit == 12


def test_memory_is_judged_where_the_model_is_more_than_an_allocator_keeps() -> None:
    found = {figure.name: figure for figure in figures([Tried(combinations()[0], 1.0, runs=runs((1, 1), (1, 1)))])}
    large, of_all = found["memory above the baseline, 64 MiB and more"], found["memory above the baseline, all"]
    assert large.value == pytest.approx(100 * 10 / 110) and large.passed
    assert of_all.value > 50 and of_all.passed is None


def test_at_least_twenty_combinations_of_every_model_strategy_and_number_of_nodes() -> None:
    wanted = combinations()
    assert len({each.name for each in wanted}) == len(wanted) >= 20
    assert {each.workload.name for each in wanted} == {model.name for model in MODELS}
    named = Counter(name_of(each.strategy).split(" ")[0] for each in wanted)
    assert set(named) == {"single_node", "data_parallel", "pipeline_parallel", "model_parallel"}
    assert {len(each.nodes) for each in wanted} == {1, 2, 3}
    assert all(sum(CPUS[node] for node in each.nodes) <= 1.75 for each in wanted), "this fits two cores"


@pytest.mark.parametrize("workload", [*MODELS, *THREE], ids=lambda workload: workload.name)
def test_every_workload_can_be_submitted(workload: Workload, tmp_path: Path) -> None:
    written = write(workload, "data_parallel", ("a", "b"), tmp_path)
    made = bundle(read_job(written.job), written.job.parent)
    assert made.data is not None and made.code is not None


@pytest.mark.parametrize("strategy", ["single_node", SHARDED, TENSOR, HYBRID, pipeline(2, 4)], ids=name_of)
def test_a_strategy_with_its_options_is_forced_as_a_job_file_says_it(strategy: Strategy, tmp_path: Path) -> None:
    written = write(GPT_MEDIUM, strategy, ("a", "b"), tmp_path)
    spec = read_job(written.job)
    name, wanted = (strategy, {}) if isinstance(strategy, str) else next(iter(strategy.items()))
    assert spec.strategy == name
    given = spec.strategy_options
    assert {key: getattr(given, key) for key in given.given} == wanted if given else not wanted


def test_the_peers_and_hive_train_the_same_thing(tmp_path: Path) -> None:
    for rival in RIVALS:
        written = write(GPT_MEDIUM, rival.strategy, ("a", "b"), tmp_path, rival.name)
        spec, peer = read_job(written.job), json.loads(written.peer.read_text())
        assert (spec.train.batch_size, spec.train.steps) == (peer["batch"], peer["steps"])
        assert (Path(strategies.__file__).parent / "peers" / rival.script).is_file()
        if rival.arguments:  # the number of micro-batches
            assert spec.strategy_options is not None
            assert rival.arguments == (str(spec.strategy_options.microbatches),)
            assert peer["batch"] % int(rival.arguments[0]) == 0


def test_steps_fill_the_time_within_bounds() -> None:
    assert steps_for(3.0, 0.1) == 30
    assert steps_for(3.0, 10.0) == 4
    assert steps_for(3.0, 0.0) == 2000


def test_the_command_line_has_every_part() -> None:
    parser = options("", strategies.BENCHMARKS, "--pairs")
    chosen = parser.parse_args(["--only", "peers", "--only", "netns", "--pairs", "9", "--quick"])
    assert (chosen.only, chosen.rounds, chosen.quick) == (["peers", "netns"], 9, True)
    assert set(strategies.BENCHMARKS) == {"peers", "uneven", "predict", "netns"}


def node(name: str, cores: float) -> NodeView:
    capacity = Capacity(
        hostname="h",
        machine_id="m",
        platform="linux",
        python="3.11",
        cores=cores,
        cores_total=2,
        memory_bytes=int(cores * 8 * 1024 * MIB),
        memory_total_bytes=8 * 1024 * MIB,
        disk_free_bytes=1 << 40,
        families={"matmul": FamilyRate(cores * 1e9, 1e-4)},
    )
    return NodeView(NodeId(f"n-{name}"), name, capacity, NodeLink.CONNECTED, Eligibility.OK, Activity.IDLE)


def question(name: str) -> Inputs:
    layers = tuple(
        LayerProfile(f"l{number}", "Linear", 1000, 1e6, 1e3, 1e3, (10,), cut_bytes_per_sample=1e3)
        for number in range(8)
    )
    profile = ModelProfile(
        framework="pytorch",
        format="source",
        family=Family.MLP,
        task="classification",
        parameters=8000,
        bytes=32000,
        trainable=True,
        dtypes=("float32",),
        input_shape=(10,),
        complexity=Complexity.SMALL,
        layers=layers,
        requirements=Requirements(1, 1, 0, 1, "layers"),
        confidence=1.0,
        why_not_cut="",
    )
    document = {
        "name": name,
        "model": {"source": "model.py:build"},
        "data": {"source": "train.npz", "features": "x", "target": "y"},
        "train": {"batch_size": 40, "steps": 10},
    }
    cluster = ClusterView((node("slow", 0.25), node("fast", 1.0)))
    return Inputs(JobSpec.model_validate(document), profile, DataProfile("d", 1000, 1000), cluster)


def test_only_a_job_called_equal_is_cut_evenly() -> None:
    strategy = AsIfEqual(DataParallel())
    own = {each.node_id: each.samples for each in strategy.estimate(question("bench")).placements}
    equal = {each.node_id: each.samples for each in strategy.estimate(question(f"bench-{EQUAL}")).placements}
    assert own["n-fast"] > 3 * own["n-slow"]
    assert equal == {"n-fast": 20, "n-slow": 20}
    assert strategy.estimate(question("bench")) == DataParallel().estimate(question("bench"))


def test_equal_stages_hold_equal_parts_of_the_model() -> None:
    strategy = AsIfEqual(PipelineParallel())
    equal, own = (strategy.estimate(question(name)).layout for name in (f"bench-{EQUAL}", "bench"))
    assert equal is not None and equal.stages == ((0, 4), (4, 8))
    assert own is not None and own.stages != equal.stages


def test_what_jobs_taught_about_a_node_does_not_make_equals_unlike() -> None:
    asked = question(f"bench-{EQUAL}")
    taught = Learned(speeds={(NodeId("n-slow"), "matmul", Work.WHOLE): Factors(work=3.0)})
    asked = replace(asked, cluster=replace(asked.cluster, learned=taught))
    assert {each.samples for each in AsIfEqual(DataParallel()).estimate(asked).placements} == {20}


def test_equals_keep_their_own_memory() -> None:
    kept = {each.name: each.capacity.memory_bytes for each in as_if_equal(question(EQUAL)).cluster.nodes}
    assert kept == {each.name: each.capacity.memory_bytes for each in question(EQUAL).cluster.nodes}


ROW = Row(
    "100 Mbit/s",
    "CNN",
    auto="data_parallel",
    steps_s={"single_node": 0.3, "data_parallel": 0.1234, "pipeline_parallel": 2.0},
    predicted_s={},
    nodes={},
    refused={"model_parallel (kind tensor)": "is for transformers"},
)


def test_the_fastest_is_in_bold_and_what_was_refused_is_said() -> None:
    head, rule, line = markdown([ROW]).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|") == 8
    assert line == "| 100 Mbit/s | CNN | 300 | **123** | 2000 | not possible | data_parallel |"


def test_the_choice_is_compared_with_the_fastest() -> None:
    assert (ROW.winner, ROW.auto_factor) == ("data_parallel", 1.0)
    assert replace(ROW, auto="single_node").auto_factor == pytest.approx(0.3 / 0.1234)
    assert replace(ROW, auto="model_parallel").auto_factor is None


def test_every_network_has_a_rate_for_every_machine() -> None:
    assert len(NETWORKS) == len(THREE) == 3
    assert all(len(rates) == len(NODES) == 4 for rates in NETWORKS.values())


def test_a_part_that_cannot_be_measured_has_not_passed() -> None:
    assert not Finding("netns", (), error="needs root").passed
