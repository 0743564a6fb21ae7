"""Checkpoints on disk: complete or absent, checked before use, tied weights kept tied, old ones safe on a full disk."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from engine_jobs import mlp_job

from protos.states import AttemptState, Reason
from strategies import checkpoint_torch
from strategies.checkpoint_torch import TrainingState, capture, load, newest, problem_with, restore, write

DIGEST = "d" * 64


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4).t())  # not contiguous

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embed(tokens))
        return logits


def trained(steps: int = 3) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.tensor([[1, 2]])).square().sum().backward()
        optimizer.step()
    return model, optimizer


def state(step: int) -> TrainingState:
    return capture(*trained(), step, step * 32, 0, copy=True)


def test_a_checkpoint_gives_back_tied_weights_buffers_and_optimizer_state(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = write(tmp_path, capture(model, optimizer, 3, 96, 1, copy=False), DIGEST, 2)
    assert folder.name == "step-00000003"
    loaded = load(folder)
    assert (loaded.step, loaded.samples, loaded.epoch) == (3, 96, 1)
    assert set(loaded.model) == {"embed.weight", "table"}  # the tied tensor lies on the disk once
    fresh = Tied()
    other = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    restore(loaded, fresh, other)
    assert fresh.head.weight is fresh.embed.weight
    for subject, opt in ((model, optimizer), (fresh, other)):
        opt.zero_grad()
        subject(torch.tensor([[3, 4]])).square().sum().backward()
        opt.step()
    assert torch.equal(model.embed.weight, fresh.embed.weight)
    assert torch.equal(fresh.get_buffer("table"), model.get_buffer("table"))


def test_only_the_newest_are_kept_and_the_newest_valid_one_is_found(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, state(step), DIGEST, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]
    assert newest(tmp_path, DIGEST).step == 15
    assert newest(tmp_path, "e" * 64).step == 0  # of another job


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "no state", "bad state"])
def test_a_damaged_checkpoint_is_skipped_with_the_reason(tmp_path: Path, damage: str) -> None:
    write(tmp_path, state(5), DIGEST, 2)
    folder = write(tmp_path, state(10), DIGEST, 2)
    model = folder / "model.safetensors"
    content = bytearray(model.read_bytes())
    match damage:
        case "flip":
            content[-1] ^= 1
            model.write_bytes(content)
        case "truncate":
            model.write_bytes(content[:-4])
        case "missing":
            (folder / "optimizer.safetensors").unlink()
        case "no state":
            (folder / "state.json").unlink()
        case "bad state":
            (folder / "state.json").write_text("[]")
    found = newest(tmp_path, DIGEST)
    assert found.step == 5
    assert len(found.skipped) == 1 and found.skipped[0].startswith("step-00000010: ")
    assert problem_with(folder, DIGEST)
    assert not problem_with(write(tmp_path, state(10), DIGEST, 2), DIGEST)  # replaced when that step is written again


@contextmanager
def no_room_above(size: int) -> Iterator[None]:
    """Files of this process cannot grow over `size` bytes: a full disk without needing one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_half_written(tmp_path: Path) -> None:
    write(tmp_path, state(5), DIGEST, 2)
    with no_room_above(64), pytest.raises(OSError, match="No space left"):
        write(tmp_path, state(10), DIGEST, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert newest(tmp_path, DIGEST).step == 5


def test_a_disk_that_fills_during_training_is_reported_as_such(tmp_path: Path) -> None:
    job = mlp_job(tmp_path, steps=2000, checkpoint={"every_s": 0.05})
    with no_room_above(64):
        outcome, channel = job.run_here()
    assert outcome.state is AttemptState.FAILED
    assert outcome.fault is not None and outcome.fault.reason is Reason.DISK_FULL
    assert not [record for record in channel.records if record["kind"] == "checkpoint"]


@pytest.mark.parametrize("memory_bytes", [None, 1])
def test_periodic_checkpoints_are_announced_and_a_run_goes_on_from_one(
    tmp_path: Path, memory_bytes: int | None
) -> None:
    """Also where there is no room for a copy of the state: training then waits for the disk."""
    job = mlp_job(tmp_path, steps=300, checkpoint={"every_s": 0.02})
    whole, channel = job.run_here(memory_bytes=memory_bytes)
    assert whole.state is AttemptState.DONE, whole.fault
    announced = [record for record in channel.records if record["kind"] == "checkpoint"]
    assert announced and all(record["samples"] > 0 for record in announced)
    digest = checkpoint_torch.spec_digest(job.spec)
    kept = next(record for record in announced if Path(record["folder"]).exists())  # never the last step
    last = Path(kept["folder"])
    assert not problem_with(last, digest)
    other = mlp_job(tmp_path / "other", steps=300)
    target = other.workspace("one").checkpoint_dir / last.name
    shutil.copytree(last, target)
    resumed, second = other.run_here()
    assert resumed.state is AttemptState.DONE, resumed.fault
    assert second.metrics()[0]["step"] == kept["step"] + 1
    assert resumed.metrics["loss"] == whole.metrics["loss"]


def test_the_spec_digest_ignores_where_and_how_a_job_runs(tmp_path: Path) -> None:
    one = mlp_job(tmp_path / "a", steps=10, accumulate=2).spec
    two = mlp_job(tmp_path / "b", steps=10, evaluate_every="end", checkpoint={"every_s": 1}).spec
    three = mlp_job(tmp_path / "c", steps=11).spec
    assert checkpoint_torch.spec_digest(one) == checkpoint_torch.spec_digest(two)
    assert checkpoint_torch.spec_digest(one) != checkpoint_torch.spec_digest(three)
