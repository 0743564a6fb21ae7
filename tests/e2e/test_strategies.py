"""Strategies that share a model among nodes, on a coordinator and nodes of their own: what is lost, joins, is slow, is
small or is put aside meanwhile changes when a job ends, never what it has learned.

One cluster for the module: two nodes of a core and a quarter of one, all granting less memory than `tower` needs.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from coordinator.jobfile import read_job
from node.calibrate import under_cap
from protos import documents
from protos.capacity import Calibration
from tests.e2e.cluster import CALIBRATION, Cluster, until
from tests.e2e.plain_torch import models, plain_torch

JOBS = Path(__file__).parent / "jobs"
MEMORY_BYTES = 900 * 1024**2
PIPELINE, SHARDED, TENSOR = "pipeline_parallel", "{model_parallel: {kind: sharded}}", "{model_parallel: {kind: tensor}}"
NAMES = {"a": 1.0, "b": 1.0, "quarter": 0.25}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("strategies")
    made = Cluster(folder, folder / "calibration")
    try:
        made.start_coordinator()
        for count, (name, cores) in enumerate(NAMES.items(), 1):
            made.start_node(name, cores, str(MEMORY_BYTES))
            made.wait_ready(count)
        believe_a_quarter(made)
        yield made
    finally:
        made.close()


def believe_a_quarter(made: Cluster) -> None:
    """Measured on a busy machine, a quarter of a core may seem to be anything: plans go by a quarter of `a`."""
    (whole,) = (made.nodes["a"].home / CALIBRATION).glob("*.json")
    calibration = under_cap(documents.decode(Calibration, whole.read_bytes()), NAMES["quarter"])
    made.nodes["quarter"].end()
    for folder in (made.nodes["quarter"].home / CALIBRATION, made.calibration):
        assert folder is not None
        for file in folder.glob("*.json"):
            if file.name != whole.name:
                file.write_bytes(documents.encode(calibration))
    made.nodes["quarter"].start()
    made.wait_ready(len(NAMES))


@pytest.fixture
def made(shared: Cluster) -> Cluster:
    for name, node in list(shared.nodes.items()):
        if name not in NAMES:  # joined in a test
            node.end()
            del shared.nodes[name]
    for name, state in shared.states().items():
        if state == "CONNECTED PAUSED":
            shared.hive_node(name, "resume")
    shared.heal()
    return shared


@cache
def reference(job: str, sets: tuple[str, ...]) -> tuple[list[float], dict[str, Tensor], list[int]]:
    return plain_torch(read_job(JOBS / job, sets))


@dataclass(frozen=True)
class Ended:
    """A job that has ended well, with every sample counted once and the losses and weights of plain torch."""

    job: dict[str, Any]
    report: dict[str, Any]

    def attempts(self, fence: int) -> list[dict[str, Any]]:
        """What each rank of one group did, in their order, with the node's name."""
        used = [{**each, "node": name} for name, node in self.report["nodes"].items() for each in node["attempts"]]
        return sorted((each for each in used if each["fence"] == fence), key=lambda each: int(each["rank"]))


def check(made: Cluster, job_id: str, job: str, sets: Sequence[str]) -> Ended:
    ended = made.wait(job_id)
    assert ended["state"] == "SUCCEEDED", ended
    losses, weights, rows = reference(job, tuple(sets))
    assert (ended["step"], ended["samples"]) == (len(rows), sum(rows))
    metrics = made.metrics(job_id)
    assert [line["step"] for line in metrics] == list(range(1, len(rows) + 1))
    assert metrics[-1]["samples"] == sum(rows)
    assert [line["loss"] for line in metrics] == pytest.approx(losses, abs=1e-4)
    trained = safetensors.torch.load_file(made.artifact(job_id, "model.safetensors"))
    assert trained.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-4)
    return Ended(ended, json.loads(made.artifact(job_id, "report.json").read_text()))


LONG = ("train.steps=300", "train.batch_size=512")  # steps that last: what kills comes half a second late


@pytest.mark.parametrize(
    ("strategy", "what"), [(PIPELINE, "node"), (SHARDED, "node"), (PIPELINE, "worker"), (TENSOR, "worker")]
)
def test_a_group_that_shares_a_model_goes_on_without_the_one_it_lost(made: Cluster, strategy: str, what: str) -> None:
    """1 two nodes share the model, a third is free 2 the parts of a checkpoint lie on the coordinator 3 kill -9 4 the
    next group takes the parts of one step and goes on from there."""
    job_id = made.submit(JOBS / "long.yaml", *LONG, f"strategy={strategy}", "checkpoint.every_s=0.2", "nodes.max=2")
    job = made.wait_step(job_id, 100)
    victim = job["nodes"][-1]
    if what == "node":
        made.nodes[victim].kill()
    else:
        for pid in made.worker_pids(victim):
            os.kill(pid, signal.SIGKILL)
    ended = check(made, job_id, "long.yaml", LONG)
    assert ended.job["fence"] >= 2
    assert ended.job["strategy"] == strategy_name(strategy)
    last = ended.attempts(ended.job["fence"])
    assert len(last) == 2
    assert all(0 < each["steps"] < 300 and each["bytes_sent"] > 0 for each in last), "it went on from a checkpoint"
    if what == "node":
        assert victim not in ended.job["nodes"]


HYBRID = "{pipeline_parallel: {stages: 2, replicas: 2}}"


def test_two_stages_on_two_nodes_each_go_on_after_a_worker_was_killed(made: Cluster) -> None:
    made.start_node("fourth", 0.5, str(MEMORY_BYTES))
    made.wait_ready(len(made.nodes))
    job_id = made.submit(JOBS / "long.yaml", *LONG, f"strategy={HYBRID}", "checkpoint.every_s=0.2")
    job = made.wait_step(job_id, 60)
    layers = {each["rank"]: tuple(each["layer_range"]) for each in made.ask("explain", job_id)["plan"]["subtasks"]}
    assert len(layers) == len(set(job["nodes"])) == 4 and layers[0] == layers[2] != layers[1] == layers[3]
    for pid in made.worker_pids(job["nodes"][1]):
        os.kill(pid, signal.SIGKILL)
    ended = check(made, job_id, "long.yaml", LONG)
    last = ended.attempts(ended.job["fence"])
    assert ended.job["fence"] >= 2 and len(last) == 4
    assert all(each["samples"] > 0 and each["bytes_sent"] > 0 for each in last)
    assert last[0]["samples"] + last[2]["samples"] == last[1]["samples"] + last[3]["samples"], "every row once a stage"


EXPORTED = ("train.steps=40",)


@pytest.mark.parametrize("strategy", [PIPELINE, "data_parallel"])
def test_an_exported_program_is_trained_without_its_source(made: Cluster, tmp_path: Path, strategy: str) -> None:
    (tmp_path / "job.yaml").write_bytes((JOBS / "long.yaml").read_bytes())
    spec = read_job(JOBS / "long.yaml", EXPORTED)
    torch.manual_seed(spec.train.seed)
    shapes = ({0: torch.export.Dim("rows")},)
    program = torch.export.export(models().wide().train(), (torch.randn(4, 64),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "wide.pt2")
    sets = (*EXPORTED, "model.source=wide.pt2", f"strategy={strategy}", "nodes.require.names=[a, b]")
    ended = check(made, made.submit(tmp_path / "job.yaml", *sets), "long.yaml", EXPORTED)
    used = ended.attempts(1)
    assert {each["node"] for each in used} == {"a", "b"} and all(each["bytes_sent"] > 0 for each in used)


TOWER: tuple[str, ...] = ()


@pytest.mark.parametrize("strategy", [PIPELINE, SHARDED, TENSOR])
def test_a_model_that_no_node_can_hold_is_trained_by_several(made: Cluster, strategy: str) -> None:
    plan = made.ask("plan", str(JOBS / "tower.yaml"), "--set", f"strategy={strategy}")["plan"]
    why = {each["strategy"]: each["reasons"] for each in plan["candidates"] if not each["feasible"]}
    assert "needs" in why["single_node"][0] and "needs" in why["data_parallel"][0], why
    job_id = made.submit(JOBS / "tower.yaml", *TOWER, f"strategy={strategy}")
    ended = check(made, job_id, "tower.yaml", TOWER)
    assert ended.job["strategy"] == strategy_name(strategy)
    used = ended.attempts(1)
    assert len(used) >= 2
    assert all(each["samples"] > 0 and each["bytes_sent"] > 0 for each in used)
    for node in {each["node"] for each in used}:
        peak = sum(each["peak_memory_bytes"] for each in used if each["node"] == node)
        assert 0 < peak < MEMORY_BYTES, f"{node}: {peak}"


UNEVEN = (  # plain SGD: Adam makes whole steps of rounding noise
    "train.steps=30",
    "train.batch_size=256",
    "model.args={width: 384, depth: 6}",
    "train.optimizer={name: sgd, lr: 0.05}",
)


@pytest.mark.parametrize("strategy", ["data_parallel", PIPELINE, SHARDED])
def test_a_node_of_a_quarter_gets_less_and_the_result_is_equal(made: Cluster, strategy: str) -> None:
    who = "nodes.require.names=[a, quarter]"
    job_id = made.submit(JOBS / "tower.yaml", *UNEVEN, f"strategy={strategy}", who, "nodes.min=2")
    ended = check(made, job_id, "tower.yaml", UNEVEN)
    used = {each["node"]: each for each in ended.attempts(1)}
    plan = ended.report["plan"]
    assert used.keys() == {"a", "quarter"}
    assert all(each["samples"] > 0 and each["bytes_sent"] > 0 for each in used.values())
    if strategy == PIPELINE:
        assert all(each["holds"] for each in used.values())
        layers = {each["rank"]: each["layer_range"][1] - each["layer_range"][0] for each in plan["subtasks"]}
        assert layers[used["quarter"]["rank"]] < layers[used["a"]["rank"]] / 1.5
    else:
        assert used["quarter"]["samples"] < used["a"]["samples"] / 1.5


PAUSED = ("train.steps=12",)


def test_a_paused_job_goes_on_under_another_strategy_on_other_nodes(made: Cluster) -> None:
    """1 auto shares the model between two small nodes 2 paused, one of them goes away 3 a node joins that can hold all
    of it 4 resumed, one node goes on from the parts of two."""
    job_id = made.submit(JOBS / "tower.yaml", *PAUSED, "strategy=auto", "checkpoint.every_s=1")
    before = made.wait_step(job_id, 3)
    assert before["strategy"] in ("model_parallel", "pipeline_parallel")
    made.hive("pause", job_id)
    made.wait_state(job_id, "PAUSED")
    made.nodes[before["nodes"][-1]].end()
    pause(made, *(set(NAMES) - {before["nodes"][-1]}))
    made.start_node("large", 1, "2GiB")
    until(lambda: made.states().get("large") == "CONNECTED IDLE", "the large node is ready", 120)
    made.hive("resume", job_id)
    ended = check(made, job_id, "tower.yaml", PAUSED)
    assert ended.job["strategy"] == "single_node"
    assert ended.job["nodes"] == ["large"]
    (used,) = ended.attempts(ended.job["fence"])
    assert 0 < used["steps"] < 12, "it went on from a checkpoint"


GROWING = ("model.source=model.py:wide", "train.batch_size=512", "train.optimizer={name: sgd, lr: 0.05}")


def test_a_node_that_joins_meanwhile_joins_the_group(made: Cluster) -> None:
    """It gets the state from a peer: nothing of it lies on its disk, and nothing was uploaded. The job is far too long
    to end by itself: what comes first on a busy machine decides nothing."""
    made.start_node("slow", 0.25, str(MEMORY_BYTES))
    until(lambda: made.states().get("slow") == "CONNECTED IDLE", "the slow node is ready", 120)
    sets = (*GROWING, "train.steps=1000000", "strategy=data_parallel", "checkpoint.every_s=3600")
    job_id = made.submit(JOBS / "long.yaml", *sets, "nodes.require.names=[quarter, slow, late]")
    assert set(made.wait_step(job_id, 5)["nodes"]) == {"quarter", "slow"}
    said = until(
        lambda: len(ranks := made.ask("explain", job_id)["ranks"]) == 2 and ranks, "both ranks have said it", 60
    )
    assert {each["node"] for each in said} == {"quarter", "slow"}
    assert all(each["step_compute_s"] > 0 and each["step_wait_s"] >= 0 for each in said)
    assert "NOW, IN A STEP" in made.hive("explain", job_id).stdout
    made.start_node("late", 1, str(MEMORY_BYTES))
    until(lambda: "late" in made.show(job_id)["nodes"], "late has joined", 180)
    joined = made.show(job_id)
    made.wait_step(job_id, joined["step"] + 5)
    made.hive("cancel", job_id)
    assert made.wait(job_id)["state"] == "CANCELLED"
    assert joined["fence"] == 2 and any("late joins the group" in json.dumps(event) for event in made.events())
    metrics = made.metrics(job_id)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1)), "no step was made twice or left out"
    assert metrics[-1]["step"] >= joined["step"] + 5
    losses, _, rows = reference("long.yaml", (*GROWING, f"train.steps={len(metrics)}"))
    assert [line["loss"] for line in metrics] == pytest.approx(losses, abs=1e-4)
    assert metrics[-1]["samples"] == sum(rows)


def test_a_model_that_fits_nowhere_is_refused_with_the_smallest_change(made: Cluster) -> None:
    sets = ("--set", "model.args={width: 8192, depth: 20}", "--set", "strategy=auto")
    refused = made.hive("plan", str(JOBS / "tower.yaml"), *sets, "-o", "json", check=False)
    assert refused.returncode == 7
    error = json.loads(refused.stdout)["error"]
    assert all(name in error["message"] for name in ("single_node", "data_parallel", "pipeline_parallel"))
    assert "what would make it fit" in error["hint"], error


def test_layers_that_cannot_be_cut_are_refused_with_the_reason(made: Cluster) -> None:
    sets = ("--set", "model={source: 'model.py:reader', args: {}}", "--set", f"strategy={TENSOR}")
    refused = made.hive("plan", str(JOBS / "mlp.yaml"), *sets, "-o", "json", check=False)
    assert refused.returncode == 7
    assert "this is a rnn model" in json.loads(refused.stdout)["error"]["message"]


def strategy_name(strategy: str) -> str:
    return strategy if strategy in (PIPELINE, "data_parallel") else "model_parallel"


def pause(made: Cluster, *names: str) -> None:
    """The owners of these nodes want them for themselves."""
    for name in names:
        made.hive_node(name, "pause")
    until(lambda: all(made.states()[name] == "CONNECTED PAUSED" for name in names), f"{names} are paused", 30)
