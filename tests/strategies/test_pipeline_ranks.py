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
from torch.nn import functional

from protos.plan import Layout, Schedule
from protos.states import AttemptState, Reason
from protos.work import Outcome
from strategies.data.dataset import epoch_order
from strategies.data.opening import open_splits
from strategies.model_torch import build
from strategies.sample_order import slice_of

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
def test_two_stages_of_a_gpt_with_tied_weights_equal_one_process(tmp_path: Path, pipeline: Pipeline) -> None:
    """The last batch of each epoch is smaller than the rest, and targets are ignored in unequal numbers."""
    job = gpt_job(tmp_path, steps=12)
    outcomes = pipeline.run(job, ("blocks.0.mlp.2",), (24,), 4)
    assert [outcome.state for outcome in outcomes] == [AttemptState.DONE] * 2, outcomes
    assert_equal_to_plain_torch(job)
    usages = [outcome.usage for outcome in outcomes]
    assert all(usage is not None and usage.bytes_sent > 0 and usage.samples == outcomes[0].samples for usage in usages)
    held = [set(usage.holds) for usage in usages if usage is not None]
    assert "blocks.0.norm1" in held[0] - held[1] and "blocks.1.norm1" in held[1] - held[0]


def norms_by_hand(job: Job, samples: tuple[int, ...], micro: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Plain torch with the statistics of a pipeline: each micro-batch is normalised by itself, one after the other on
    each replica, and after a step the replicas' running statistics are averaged by their rows."""
    train, losses = job.spec.train, []
    torch.manual_seed(train.seed)
    model = build(job.spec.model, job.folder / "code", None, train.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=train.optimizer.lr)
    data = open_splits(job.spec.data, job.data, job.folder / "code", test_path=job.test, loss=train.loss).train
    per_epoch = -(-data.rows // train.batch_size)
    for step in range(train.steps or 0):
        epoch, position = divmod(step, per_epoch)
        rows = epoch_order(data, train.seed, epoch, train.shuffle).batch(position, train.batch_size)
        before = {name: value.clone() for name, value in model.named_buffers()}
        after = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in before.items()}
        optimizer.zero_grad()
        total = 0.0
        for replica, size in enumerate(samples):
            start, stop = slice_of(len(rows), samples, replica)
            model.load_state_dict(before, strict=False)
            for first in range(start, stop, -(-size // micro)):
                batch = data.batch(rows[first : min(first + -(-size // micro), stop)])
                output, target = model(torch.from_numpy(batch.features)), torch.from_numpy(batch.target)
                loss = functional.cross_entropy(output, target, reduction="sum") / len(rows)
                loss.backward()
                total += loss.item()
            for name, value in model.named_buffers():
                after[name] += value * (stop - start) / len(rows)
        model.load_state_dict({name: value.to(before[name].dtype) for name, value in after.items()}, strict=False)
        optimizer.step()
        losses.append(total)
    return losses, model.state_dict()


@pytest.mark.slow
def test_norms_follow_the_micro_batches_and_the_replicas(tmp_path: Path, pipeline: Pipeline) -> None:
    sgd = {"name": "sgd", "lr": 0.1}  # a bias before a norm has no gradient but rounding, which AdamW would magnify
    job = mlp_job(tmp_path, steps=15, norm=True, clip_norm=None, schedule={"name": "constant"}, optimizer=sgd)
    outcomes = pipeline.run(job, ("norm",), (20, 12), 2)
    assert [outcome.state for outcome in outcomes] == [AttemptState.DONE] * 4, outcomes
    losses, expected = norms_by_hand(job, (20, 12), 2)
    assert curve(job) == pytest.approx(losses, abs=1e-4)
    trained = weights(job)
    for name in ("norm.running_mean", "norm.running_var", "second.weight"):
        assert torch.allclose(trained[name], expected[name], atol=1e-4), name


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
