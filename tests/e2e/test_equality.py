"""What hive trains is what plain torch trains: the same losses and the same weights, on one node and on unequal two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from coordinator.jobfile import read_job
from strategies.sample_order import cut
from tests.e2e.cluster import Cluster, start_cluster
from tests.e2e.plain_torch import plain_torch

JOBS = Path(__file__).parent / "jobs"
STEPS = 50

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> Iterator[Cluster]:
    """One node has so much more CPU time that it gets more to do, however busy the machine is meanwhile."""
    with start_cluster(tmp_path_factory.mktemp("uneven"), calibration, (1, 0.4)) as made:
        yield made


def train(made: Cluster, job: Path, strategy: str) -> tuple[list[float], dict[str, Tensor], dict[str, object]]:
    """Uncompressed: `auto` takes fp16 where the measured link makes that pay, which on a busy machine loopback can."""
    job_id = made.submit(job, f"strategy={strategy}", "sync.compression=none")
    ended = made.wait(job_id)
    assert (ended["state"], ended["strategy"]) == ("SUCCEEDED", strategy), ended
    lines = [json.loads(line) for line in made.artifact(job_id, "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["stage"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    weights = safetensors.torch.load_file(made.artifact(job_id, "model.safetensors"))
    return [line["loss"] for line in trained], weights, json.loads(made.artifact(job_id, "report.json").read_text())


@pytest.mark.parametrize("name", ["mlp", "gpt"])
@pytest.mark.parametrize("strategy", ["data_parallel", "single_node"])
def test_training_equals_plain_torch(uneven: Cluster, name: str, strategy: str) -> None:
    job = JOBS / f"{name}.yaml"
    losses, weights, report = train(uneven, job, strategy)
    expected_losses, expected_weights, rows = plain_torch(read_job(job))

    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert weights.keys() == expected_weights.keys()
    for key, tensor in weights.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected_weights[key], rtol=0, atol=1e-4)

    subtasks = report["plan"]["subtasks"]  # type: ignore[index]
    names = {node["id"]: node["name"] for node in uneven.show_nodes()}
    slices = [subtask["data_range"][1] - subtask["data_range"][0] for subtask in subtasks]
    assert len(slices) == (2 if strategy == "data_parallel" else 1)
    assert min(slices) > 0 and sum(slices) == max(rows)
    assert len(set(slices)) == len(slices), "the nodes are unequal, so are their slices"
    shares = {names[each["node_id"]]: sum(cut(count, slices)[rank] for count in rows)
              for rank, each in enumerate(subtasks)}  # fmt: skip
    done = {node: used["samples"] for node, used in report["nodes"].items()}  # type: ignore[attr-defined]
    assert done == shares
    assert all(used["steps"] == STEPS for used in report["nodes"].values())  # type: ignore[attr-defined]
    assert report["job"]["samples"] == sum(rows)  # type: ignore[index]
