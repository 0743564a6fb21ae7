"""Pipelines of real processes over gloo, against one process of plain torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from engine_harness import Job, Rank, metrics_of
from engine_jobs import GPT, gpt_job, mlp_job, plain_torch

from protos.plan import Layout, Schedule
from protos.states import AttemptState, Reason
from protos.work import Outcome

SLOW_GPT = (
    GPT.replace("    def forward(self, tokens):", "    def forward(self, tokens):\n        wait(tokens)")
    .replace(
        "import torch\n",
        """import time
import torch


@torch.library.custom_op("hive_test::wait", mutates_args=())
def wait(tokens: torch.Tensor) -> torch.Tensor:
    time.sleep(0.01)
    return tokens.clone()


@wait.register_fake
def _(tokens):
    return torch.empty_like(tokens)


""",
        1,
    )
    .replace("wait(tokens)\n", "tokens = wait(tokens)\n")
)


class Pipeline:
    """Starts ranks of jobs under a layout, one node each, and ends what is left of them."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self.ranks: list[Rank] = []

    def replicas(self, job: Job, samples: tuple[int, ...], fence: int) -> list[Rank]:
        started = [
            Rank(job, self.store.port, f"node{rank}", job.task(rank, samples, fence), str(fence))
            for rank in range(len(samples))
        ]
        self.ranks += started
        return started

    def start(
        self, job: Job, cut_after: tuple[str, ...], samples: tuple[int, ...], micro: int, fence: int = 1, **values: Any
    ) -> list[Rank]:
        stages = len(cut_after) + 1
        layout = Layout(
            tuple((s, s + 1) for s in range(stages)),
            cut_after,
            len(samples),
            values.pop("schedule", Schedule.ONE_F_ONE_B),
        )
        world = stages * len(samples)
        started = []
        for rank in range(world):
            task = job.task(rank, samples, fence, world_size=world, layout=layout, accumulate=micro, **values)
            started.append(Rank(job, self.store.port, f"node{rank}", task, str(fence)))
        self.ranks += started
        return started

    def run(self, *args: Any, **values: Any) -> list[Outcome]:
        ranks = self.start(*args, **values)
        return [rank.outcome() for rank in ranks]


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    made = Pipeline()
    yield made
    for rank in made.ranks:
        rank.end()


def records(job: Job, fence: int = 1) -> list[dict[str, Any]]:
    lines = (job.folder / f"node0-run-{fence}" / "progress.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(job: Job, fence: int = 1) -> list[float]:
    return [metric["loss"] for metric in metrics_of(records(job, fence))]


def weights(job: Job, fence: int = 1) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(job.folder / "node0" / f"output-{fence}" / "model.safetensors")


def assert_equal_to_plain_torch(job: Job, fence: int = 1) -> None:
    expected_losses, expected = plain_torch(job)
    assert np.allclose(curve(job, fence), expected_losses, atol=1e-4)
    trained = weights(job, fence)
    for name, tensor in expected.items():
        assert torch.allclose(trained[name], tensor, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_stage_is_a_lost_peer_for_the_other_and_a_held_part(
    tmp_path: Path, pipeline: Pipeline, victim: int
) -> None:
    job = gpt_job(tmp_path, steps=500)
    (job.folder / "code" / "model.py").write_text(SLOW_GPT)
    ranks = pipeline.start(job, ("blocks.0",), (24,), 3, schedule=Schedule.GPIPE)
    ranks[0].wait_until(lambda records: any(r["kind"] == "progress" and r["step"] >= 5 for r in records))
    ranks[victim].process.kill()
    fault = ranks[1 - victim].outcome().fault
    assert fault is not None and fault.reason is Reason.PEER_LOST and fault.retryable
    folders = list((job.folder / f"node{1 - victim}" / "checkpoints").iterdir())
    assert any(f"{2 - victim}-of-2" in folder.name for folder in folders)


@pytest.mark.slow
def test_two_replicas_of_two_stages_with_unequal_slices_equal_one_process(tmp_path: Path, pipeline: Pipeline) -> None:
    job = mlp_job(tmp_path, steps=20, test_rows=37)
    outcomes = pipeline.run(job, ("first",), (24, 8), 4)
    assert [outcome.state for outcome in outcomes] == [AttemptState.DONE] * 4, outcomes
    assert_equal_to_plain_torch(job)


def held_after(ranks: list[Rank], step: int) -> list[Outcome]:
    ranks[0].wait_until(lambda records: any(r["kind"] == "progress" and r["step"] >= step for r in records))
    for rank in ranks:
        rank.say("hold")
    return [rank.outcome() for rank in ranks]


@pytest.mark.slow
def test_a_held_job_goes_on_under_other_decompositions_as_if_nothing_had_happened(
    tmp_path: Path, pipeline: Pipeline
) -> None:
    """Two stages, then two replicas, then two stages cut elsewhere; each node has its own disk."""
    slow = SLOW_GPT
    job = gpt_job(tmp_path, steps=80, optimizer={"name": "adamw", "lr": 0.003})
    (job.folder / "code" / "model.py").write_text(slow)
    first = held_after(pipeline.start(job, ("blocks.0",), (24,), 3, fence=1), 10)
    assert all(outcome.held_step is None and outcome.step >= 10 for outcome in first)  # only parts lie on each node
    second = held_after(pipeline.replicas(job, (16, 8), 2), first[0].step + 5)
    assert all(outcome.held_step is not None and outcome.held_step > first[0].step for outcome in second)
    last = [rank.outcome() for rank in pipeline.start(job, ("blocks.1.mlp",), (24,), 4, fence=3)]
    assert [outcome.state for outcome in last] == [AttemptState.DONE] * 2, last
    assert last[0].samples == 80 * 24
    usage = last[0].usage
    assert usage is not None and usage.steps == 80 - min(outcome.step for outcome in second)
    expected_losses, expected = plain_torch(job)
    seen = {metric["step"]: metric["loss"] for fence in (1, 2, 3) for metric in metrics_of(records(job, fence))}
    assert [seen[step] for step in range(1, 81)] == pytest.approx(expected_losses, abs=1e-4)
    trained = weights(job, 3)
    assert all(torch.allclose(trained[name], tensor, atol=1e-4) for name, tensor in expected.items())
