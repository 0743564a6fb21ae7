"""Metrics and output of a job on disk: appended by repeated and torn messages, read as if each came once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from coordinator import job_folder
from coordinator.job_folder import ALL_RANKS, JobFolders
from protos.ids import JobId
from protos.work import Metrics

JOB = JobId("j-1")


def train(step: int, loss: float | None = 0.5, stage: str = "train") -> Metrics:
    return Metrics(1.0, step, 0, stage, loss, step * 32)


def test_metrics_come_back_in_order_each_step_once(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    folders.append_metrics(JOB, [train(1), train(2), train(3)])
    folders.append_metrics(JOB, [train(2, 0.4), train(3, 0.3), train(3, stage="evaluate"), train(4)])
    found = folders.metrics(JOB)
    assert [(line["step"], line["stage"]) for line in found] == [
        (1, "train"), (2, "train"), (3, "train"), (3, "evaluate"), (4, "train")
    ]  # fmt: skip
    assert found[1]["loss"] == 0.4
    assert [line["step"] for line in folders.metrics(JOB, after_step=3)] == [4]
    assert folders.metrics(JobId("j-2")) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_null_so_that_any_reader_can_read_it(tmp_path: Path, loss: float) -> None:
    folders = JobFolders(tmp_path)
    folders.append_metrics(JOB, [train(1, loss)])
    assert folders.metrics(JOB)[0]["loss"] is None
    text = (tmp_path / JOB / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_line_torn_by_a_kill_is_ended_and_skipped(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    folders.append_metrics(JOB, [train(1), train(2)])
    path = tmp_path / JOB / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    JobFolders(tmp_path).append_metrics(JOB, [train(2, 0.1), train(3)])
    assert [(line["step"], line["loss"]) for line in folders.metrics(JOB)] == [(1, 0.5), (2, 0.1), (3, 0.5)]


def test_output_is_kept_per_rank_and_together(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    folders.append_log(JOB, 0, ["hello\n", "world"])
    folders.append_log(JOB, 1, ["again"])
    assert folders.log_path(JOB, 0).read_text() == "hello\nworld\n"
    assert folders.log_path(JOB, 1).read_text() == "again\n"
    assert folders.log_path(JOB, ALL_RANKS).read_text() == "[rank 0] hello\n[rank 0] world\n[rank 1] again\n"


def test_output_over_the_limit_is_dropped_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_folder, "MAX_LOG_BYTES", 200)
    folders = JobFolders(tmp_path)
    for _ in range(30):
        folders.append_log(JOB, 0, ["x" * 20])
    for rank in (0, ALL_RANKS):
        text = folders.log_path(JOB, rank).read_text()
        assert text.count("over the limit was dropped") == 1
        assert len(text) < 400


def test_followers_are_woken_by_output(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    waiting = folders.changed
    folders.append_log(JOB, 0, ["hello"])
    assert waiting.is_set()
    assert not folders.changed.is_set()


def test_a_job_folder_is_for_its_owner_only(tmp_path: Path) -> None:
    assert JobFolders(tmp_path).folder(JOB).stat().st_mode & 0o077 == 0
