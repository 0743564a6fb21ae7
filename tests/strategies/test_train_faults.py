"""How a task that cannot finish says so: the reason, whose fault, what to do, and none of the engine's frames."""

from __future__ import annotations

import errno
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_harness import RecordingChannel
from engine_jobs import GPT, MLP, mlp_job

from protos import documents
from protos.errors import Blame, DeadlineExceeded, ErrorCode, SpecError
from protos.jobspec import BUILT_OPTIMIZERS
from protos.optimizer_keywords import KEYWORDS
from protos.plan import Identification
from protos.states import AttemptState, Reason, StopMode
from protos.work import Fault
from strategies.context import TaskContext
from strategies.data.dataset import Batch
from strategies.data.finite import not_finite
from strategies.evaluate_torch import Score
from strategies.faults_torch import NotANumber, PeerLost, Stopped, fault_of
from strategies.model_torch import load_weights
from strategies.optimizer_torch import _CLASSES
from strategies.profile_torch import identify
from strategies.train_loop_torch import metrics_of

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


@pytest.mark.parametrize("fits", [True, False])
def test_data_other_than_those_identified_are_not_trained_on_and_the_node_is_blamed(tmp_path: Path, fits: bool) -> None:
    job = mlp_job(tmp_path, steps=3)
    job.document["data"] = {"source": "builtin:stdlib", "args": {"limit_bytes": 20_000}, "sequence_length": 12}
    job.document["train"]["loss"] = "causal_lm"
    job.document["model"] = {"source": "gpt.py:build", "args": {"vocabulary": 256}}
    job.code = {"gpt.py": GPT}
    job.data = None
    job.__post_init__()
    context = TaskContext(job.task(), job.workspace("looks"), RecordingChannel(), "", 1, "cpu", "looks")
    answer = identify(context)
    digest = documents.decode(Identification, answer.document).data.digest
    outcome, _ = job.run_here(data_digest=digest if fits else "0" * 64)
    if fits:
        assert outcome.state is AttemptState.DONE, outcome.fault
        return
    found = outcome.fault
    assert (found.reason, found.blame, found.retryable) == (Reason.DATA_UNUSABLE, Blame.NODE, True)
    assert "builtin:stdlib on one" in found.message and "same Python release" in found.hint


def test_a_package_that_is_missing_here_is_the_nodes_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    job = mlp_job(tmp_path, steps=3)
    job.document["data"] = {"source": "train.parquet", "target": "y"}
    job.data = tmp_path / "train.parquet"
    job.data.write_bytes(b"PAR1 and so on PAR1")
    job.__post_init__()
    found = fault(job)
    assert (found.reason, found.blame, found.retryable) == (Reason.DATA_UNUSABLE, Blame.NODE, True)
    assert "pyarrow" in found.message and "on one only" in found.hint


def test_an_optimizer_value_torch_does_not_take_is_named(tmp_path: Path) -> None:
    found = fault(mlp_job(tmp_path, steps=3, optimizer={"name": "sgd", "lr": 0.1, "momentum": -0.9}))
    assert found.reason is Reason.USER_CODE
    assert "Invalid momentum value: -0.9" in found.message


@pytest.mark.parametrize("name", BUILT_OPTIMIZERS)
def test_the_keywords_a_job_file_may_give_an_optimizer_are_torch_s(name: str) -> None:
    taken = set(inspect.signature(_CLASSES[name].__init__).parameters)
    assert set(KEYWORDS[name]) == taken - {"self", "params", "lr"}


def test_values_that_are_no_numbers_are_the_data_s_fault_and_named(tmp_path: Path) -> None:
    job = mlp_job(tmp_path, steps=50)
    with np.load(tmp_path / "train.npz") as arrays:
        x, y = arrays["x"].copy(), arrays["y"]
    x[17, 5] = np.inf
    np.savez(tmp_path / "train.npz", x=x, y=y)
    found = fault(job)
    assert (found.reason, found.retryable) == (Reason.DATA_UNUSABLE, False)
    assert "feature column 5" in found.message and "in row 17 " in found.message
    assert "learning rate" not in found.message


def test_columns_and_row_ranges_are_named_where_values_are_not_finite() -> None:
    rows = np.array([40, 3, 9])
    table = np.array([[1.0, np.nan], [1.0, 2.0], [1.0, -np.inf]], dtype=np.float32)
    assert "column 'b'" in (not_finite(Batch(table, None), rows, ["a", "b"]) or "")
    assert "in 2 rows from 9 to 40" in (not_finite(Batch(table, None), rows) or "")
    assert "'target'" in (not_finite(Batch({"x": table[:, :1]}, table), rows) or "")
    assert not_finite(Batch(np.arange(3), table[:, :1]), rows) is None


def test_a_metric_that_is_not_a_number_is_left_out() -> None:
    run: Any = SimpleNamespace(
        reporter=SimpleNamespace(last_loss=float("nan"), mean_rate=3.0), score=Score(float("inf"), 0.5)
    )
    assert metrics_of(run) == {"samples_per_s": 3.0, "accuracy": 0.5}


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
