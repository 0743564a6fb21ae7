"""How a task that cannot finish says so: the reason, whose fault, what to do, and none of the engine's frames."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_jobs import MLP, mlp_job

from protos.errors import Blame, DeadlineExceeded, ErrorCode, SpecError
from protos.states import AttemptState, Reason, StopMode
from protos.work import Fault
from strategies.faults_torch import NotANumber, PeerLost, Stopped, fault_of
from strategies.model_torch import load_weights

RAISES = MLP.replace(
    "        return self.second(", "        raise KeyError('no such layer')\n        return self.second("
)


def fault(job: object) -> Fault:
    outcome, _ = job.run_here()  # type: ignore[attr-defined]
    assert outcome.state is AttemptState.FAILED
    assert outcome.fault is not None
    return outcome.fault


def test_an_exception_in_the_users_model_shows_only_their_frames(tmp_path: Path) -> None:
    found = fault(mlp_job(tmp_path, steps=3, code={"model.py": RAISES}))
    assert (found.reason, found.blame, found.retryable) == (Reason.USER_CODE, Blame.USER_CODE, False)
    assert "KeyError" in found.message and "model.py line" in found.message
    text = "\n".join(found.last_lines)
    assert 'File "model.py"' in text and "no such layer" in text
    assert "train_loop" not in text and "site-packages" not in text and str(tmp_path) not in text


@pytest.mark.parametrize(
    ("source", "reason", "words"),
    [
        ("def build(**args):\n    return 3\n", Reason.MODEL_UNUSABLE, "not a torch.nn.Module"),
        ("def other():\n    pass\n", Reason.MODEL_UNUSABLE, "no function 'build'"),
        ("def build(**args)\n    return 3\n", Reason.USER_CODE, "SyntaxError"),
        ("import nothing_like_this\n", Reason.USER_CODE, "nothing_like_this"),
        ("def build(wrong):\n    return 3\n", Reason.USER_CODE, "unexpected keyword"),
        ("import sys\nsys.exit(3)\n", Reason.USER_CODE, "SystemExit"),
        (MLP.replace("inputs=8", "inputs=9"), Reason.USER_CODE, "shapes cannot be multiplied"),
    ],
)
def test_a_model_that_cannot_be_built_or_run_is_the_users_to_mend(
    tmp_path: Path, source: str, reason: Reason, words: str
) -> None:
    found = fault(mlp_job(tmp_path, steps=3, code={"model.py": source}))
    assert found.reason is reason, found
    assert words in found.message
    assert found.hint and not found.retryable


def test_an_output_the_loss_cannot_compare_names_both_shapes(tmp_path: Path) -> None:
    narrow = MLP.replace("torch.nn.Linear(hidden, classes)", "torch.nn.Linear(hidden, 2)")
    found = fault(mlp_job(tmp_path, steps=3, code={"model.py": narrow}))
    assert found.reason is Reason.MODEL_UNUSABLE
    assert "[32, 2]" in found.message


def test_a_loss_that_is_not_a_number_names_step_and_learning_rate(tmp_path: Path) -> None:
    optimizer = {"name": "sgd", "lr": 1e30}
    found = fault(mlp_job(tmp_path, steps=50, optimizer=optimizer, clip_norm=None, schedule={}))
    assert (found.reason, found.retryable) == (Reason.NOT_A_NUMBER, False)
    assert "at step" in found.message and "1e+30" in found.message
    assert "clip_norm" in found.hint


def test_a_wrong_column_is_a_fault_of_the_data(tmp_path: Path) -> None:
    job = mlp_job(tmp_path, steps=3)
    job.document["data"]["target"] = "label"
    job.__post_init__()
    found = fault(job)
    assert (found.reason, found.retryable) == (Reason.DATA_UNUSABLE, False)
    assert "label" in found.message


def test_an_optimizer_keyword_torch_does_not_know_is_named(tmp_path: Path) -> None:
    found = fault(mlp_job(tmp_path, steps=3, optimizer={"name": "sgd", "lr": 0.1, "momentumm": 0.9}))
    assert found.reason is Reason.USER_CODE
    assert "momentumm" in found.message


@pytest.mark.parametrize(
    ("error", "reason", "retryable"),
    [
        (PeerLost("gone"), Reason.PEER_LOST, True),
        (DeadlineExceeded("nobody came"), Reason.PEER_LOST, True),
        (Stopped(StopMode.PAUSE), Reason.PAUSED_BY_USER, True),
        (Stopped(StopMode.CANCEL), Reason.CANCELLED_BY_USER, False),
        (Stopped(StopMode.HOLD), Reason.PEER_LOST, True),
        (NotANumber(3, 0.1, float("nan")), Reason.NOT_A_NUMBER, False),
        (MemoryError(), Reason.OUT_OF_MEMORY, True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes"), Reason.OUT_OF_MEMORY, True),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), Reason.DISK_FULL, True),
        (SpecError("bad rows", code=ErrorCode.DATA_UNUSABLE), Reason.DATA_UNUSABLE, False),
        (ZeroDivisionError(), Reason.INTERNAL, False),
    ],
)
def test_every_exception_has_a_fault(error: Exception, reason: Reason, retryable: bool) -> None:
    found = fault_of(error, None)
    assert (found.reason, found.retryable) == (reason, retryable)
    assert found.message


def test_weights_that_do_not_fit_name_the_keys(tmp_path: Path) -> None:
    torch.save({"0.weight": torch.zeros(2, 3), "9.bias": torch.zeros(1)}, tmp_path / "w.pt")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    with pytest.raises(SpecError, match=r"missing: 0\.bias; unexpected: 9\.bias; other shapes: 0\.weight") as caught:
        load_weights(model, tmp_path / "w.pt")
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE


def test_pickled_objects_are_never_unpickled(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(SpecError, match="more than tensors"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(SpecError, match=r"array\.npy"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "array.npy")
