"""One rank through the real entry point, against the same loop in plain torch written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from engine_harness import Rank
from engine_jobs import MLP, gpt_job, mlp_job, plain_torch
from torch.nn import functional

from protos.states import AttemptState, Reason
from strategies.loss_torch import Loss
from strategies.model_torch import build


def losses(channel: Any) -> list[float]:
    return [metric["loss"] for metric in channel.metrics()]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_rank_equals_plain_torch_with_clipping_and_a_schedule(tmp_path: Path, accumulate: int) -> None:
    job = mlp_job(tmp_path, steps=50)
    outcome, channel = job.run_here(accumulate=accumulate)
    assert outcome.state is AttemptState.DONE, outcome.fault
    expected_losses, expected = plain_torch(job)
    assert np.allclose(losses(channel), expected_losses, atol=1e-5)
    trained = safetensors.torch.load_file(job.folder / "one" / "output-0" / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.allclose(trained[name], tensor, atol=1e-4), name
    assert outcome.step == 50
    assert outcome.artifacts[0].name == "model.safetensors"


def test_a_small_gpt_with_tied_embeddings_equals_plain_torch_and_its_result_loads_with_load_state_dict(
    tmp_path: Path,
) -> None:
    job = gpt_job(tmp_path, steps=12)
    outcome, channel = job.run_here()
    assert outcome.state is AttemptState.DONE, outcome.fault
    expected_losses, expected = plain_torch(job)
    assert np.allclose(losses(channel), expected_losses, atol=1e-5)
    trained = safetensors.torch.load_file(job.folder / "one" / "output-0" / "model.safetensors")
    assert set(trained) == set(expected)  # the tied name is there too
    for name, tensor in expected.items():
        assert torch.allclose(trained[name], tensor, atol=1e-4), name


def test_what_the_code_of_a_model_imports_is_part_of_the_baseline_of_its_memory(tmp_path: Path) -> None:
    """In processes of their own: what this one has freed would hide what is new."""
    code = MLP.replace("import torch\n", "import torch\n\nLIBRARY = torch.ones(25_000_000)\n", 1)
    jobs = (
        mlp_job(tmp_path / "with", steps=2, code={"model.py": code}),
        mlp_job(tmp_path / "without", steps=2),
    )
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    ranks = [Rank(job, store.port, "one", job.task()) for job in jobs]
    try:
        with_library, without = (rank.outcome() for rank in ranks)
    finally:
        for rank in ranks:
            rank.end()
    assert with_library.usage is not None and without.usage is not None
    assert with_library.usage.baseline_memory_bytes - without.usage.baseline_memory_bytes > 90_000_000


def test_samples_epochs_evaluation_and_progress_are_counted(tmp_path: Path) -> None:
    job = mlp_job(tmp_path, epochs=2, rows=100, test_rows=40)
    outcome, channel = job.run_here()
    assert outcome.state is AttemptState.DONE, outcome.fault
    assert outcome.samples == 200
    assert outcome.step == 8
    assert [metric["samples"] for metric in channel.metrics()] == [32, 64, 96, 100, 132, 164, 196, 200]
    assert [metric["epoch"] for metric in channel.metrics()] == [0] * 4 + [1] * 4
    evaluations = channel.metrics("evaluate")
    assert [metric["step"] for metric in evaluations] == [4, 8]
    _, weights = plain_torch(job)
    model = _built(job)
    model.load_state_dict(weights)
    test = np.load(job.test)
    features, target = torch.from_numpy(test["x"]), torch.from_numpy(test["y"])
    output = model.eval()(features)
    assert evaluations[-1]["loss"] == pytest.approx(functional.cross_entropy(output, target).item(), abs=1e-4)
    assert outcome.metrics["accuracy"] == pytest.approx((output.argmax(1) == target).float().mean().item())
    assert outcome.metrics["loss"] == pytest.approx(losses(channel)[-1])
    assert outcome.usage.samples == 200
    assert outcome.usage.peak_memory_bytes > 0


def test_stopping_and_resuming_gives_the_curve_of_an_uninterrupted_run_with_dropout(tmp_path: Path) -> None:
    whole, whole_channel = mlp_job(tmp_path / "a", steps=40, dropout=0.3).run_here()
    assert whole.state is AttemptState.DONE, whole.fault
    job = mlp_job(tmp_path / "b", steps=40, dropout=0.3)
    paused, first = job.run_here(stop_at_step=1)
    assert paused.state is AttemptState.FAILED
    assert paused.fault.reason is Reason.PAUSED_BY_USER
    assert paused.held_step == paused.step
    assert 0 < paused.step < 40
    done, second = job.run_here(attempt="1")
    assert done.state is AttemptState.DONE, done.fault
    assert done.samples == whole.samples
    assert losses(first) + losses(second) == losses(whole_channel)  # bit for bit
    assert second.metrics()[0]["step"] == paused.step + 1


def test_text_is_sampled_after_training_when_the_model_file_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = "\n\ndef sample(model):\n    return f'sample in mode {model.training}'\n"
    job = mlp_job(tmp_path, steps=2, code={"model.py": MLP + hook})
    outcome, _ = job.run_here()
    assert outcome.state is AttemptState.DONE, outcome.fault
    assert "sample in mode False" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mse", "l1", "bce_with_logits"])
def test_losses_on_numbers_equal_plain_torch(tmp_path: Path, name: str) -> None:
    job = mlp_job(tmp_path, steps=10, loss=name, classes=1)
    outcome, channel = job.run_here(accumulate=2)
    assert outcome.state is AttemptState.DONE, outcome.fault
    assert np.allclose(losses(channel), plain_torch(job)[0], atol=1e-5)


def test_the_users_own_loss_is_averaged_over_rows(tmp_path: Path) -> None:
    source = (
        "import torch\n\n\ndef mine(output, target):\n    return torch.nn.functional.cross_entropy(output, target)\n"
    )
    job = mlp_job(tmp_path, steps=10, loss="losses.py:mine", code={"model.py": MLP, "losses.py": source})
    outcome, channel = job.run_here(accumulate=3)
    assert outcome.state is AttemptState.DONE, outcome.fault
    assert np.allclose(losses(channel), plain_torch(job)[0], atol=1e-5)


def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    _, full = mlp_job(tmp_path / "a", steps=20).run_here()
    outcome, half = mlp_job(tmp_path / "b", steps=20, precision="bf16").run_here()
    assert outcome.state is AttemptState.DONE, outcome.fault
    assert np.allclose(losses(full), losses(half), atol=0.05)


def _built(job: Any) -> torch.nn.Module:
    return build(job.spec.model, job.folder / "code", None, 0)


def test_ignored_targets_are_left_out_of_the_mean() -> None:
    loss = Loss("cross_entropy", None)
    output, target = torch.randn(6, 3), torch.tensor([0, -100, 2, 1, -100, 0])
    mean = loss(output, target) / loss.items(target)
    assert mean.item() == pytest.approx(functional.cross_entropy(output, target).item(), abs=1e-6)
