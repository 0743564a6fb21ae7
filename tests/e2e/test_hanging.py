"""Models that hang while they are looked at: whoever cancels or pauses such a job frees the node for everybody."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, cluster, until

MODEL = """
import os, threading
from torch import nn
def good():
    return nn.Linear(64, 10)
def hangs(number=0):
    print("hanging", number)
    threading.Event().wait()
def leaves():
    print("about to leave")
    os._exit(7)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("hanging"), calibration, nodes=1) as made:
        yield made


def job(folder: Path, function: str, **args: int) -> Path:
    (folder / "hanging.py").write_text(MODEL)
    model = {"source": f"hanging.py:{function}", "args": args}
    document = {"name": function, "model": model, "data": {"source": "builtin:digits"}, "train": {"steps": 5}}
    document["strategy"] = "single_node"
    path = folder / f"{function}.yaml"
    path.write_text(json.dumps(document))
    return path


def test_jobs_that_hang_are_cancelled_or_paused_and_a_good_one_is_not_kept_waiting(
    made: Cluster, tmp_path: Path
) -> None:
    hanging = [made.submit(job(tmp_path, "hangs", number=number)) for number in range(2)]
    until(lambda: len(made.worker_pids("n0")) == 2, "both are being looked at")
    made.hive("cancel", hanging[0])
    made.hive("pause", hanging[1])
    until(lambda: not made.worker_pids("n0"), "their workers are gone", 10.0)
    began = time.monotonic()
    good = made.submit(job(tmp_path, "good"))
    assert made.wait(good)["state"] == "SUCCEEDED" and time.monotonic() - began < 30.0
    made.hive("resume", hanging[1])
    until(lambda: len(made.worker_pids("n0")) == 1, "it is looked at again")
    made.hive("cancel", hanging[1])
    until(lambda: not made.worker_pids("n0"), "its worker is gone", 10.0)


def test_what_a_model_printed_before_it_left_is_in_the_jobs_log(made: Cluster, tmp_path: Path) -> None:
    done = made.hive("submit", str(job(tmp_path, "leaves")), "--wait", "-o", "json", check=False)
    ended = json.loads(done.stdout)["job"]
    assert (done.returncode, ended["state"], ended["reason"]) == (3, "FAILED", "model_unusable")
    assert "exit code 7" in ended["message"] and "about to leave" in ended["last_lines"]
    assert "about to leave" in made.hive("logs", ended["id"]).stdout
