"""Whatever is killed or frozen during training, the job ends SUCCEEDED with every sample counted once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, cluster, until

JOB = Path(__file__).parent / "jobs" / "long.yaml"
STEPS = 1500
ROWS = 1438  # of builtin:digits' training part
SAMPLES = (STEPS // 23) * ROWS + sum([64] * (STEPS % 23))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def made(tmp_path: Path, calibration: Path) -> Iterator[Cluster]:
    with cluster(tmp_path, calibration, nodes=2, cpus=1) as started:
        yield started


def check_finished(made: Cluster, job_id: str) -> dict[str, object]:
    job = made.wait(job_id, 180)
    assert job["state"] == "SUCCEEDED", job
    assert job["step"] == STEPS
    assert job["samples"] == SAMPLES
    steps = [line["step"] for line in made.ask("explain", job_id).get("metrics", [])]
    assert len(steps) == len(set(steps))
    return job


def test_a_killed_worker_costs_no_committed_step(made: Cluster) -> None:
    job_id = made.submit(JOB)
    made.wait_step(job_id, 200)
    os.kill(made.worker_pids("n1")[0], signal.SIGKILL)
    job = check_finished(made, job_id)
    assert job["fence"] == 2


def test_a_killed_node_daemon_leaves_its_work_to_the_other(made: Cluster) -> None:
    job_id = made.submit(JOB)
    made.wait_step(job_id, 200)
    made.nodes["n1"].kill()
    job = check_finished(made, job_id)
    assert job["nodes"] == ["n0"]


def test_a_killed_coordinator_is_a_non_event(made: Cluster) -> None:
    job_id = made.submit(JOB)
    made.wait_step(job_id, 200)
    assert made.coordinator is not None
    made.coordinator.kill()
    made.start_coordinator()
    job = check_finished(made, job_id)
    assert job["fence"] == 1


def test_a_frozen_node_is_left_behind_and_fenced_off_when_it_wakes(made: Cluster) -> None:
    job_id = made.submit(JOB, "train.steps=1500")
    made.wait_step(job_id, 200)
    frozen = made.nodes["n1"]
    workers = made.worker_pids("n1")
    for pid in (frozen.pid, *workers):
        os.kill(pid, signal.SIGSTOP)
    until(lambda: made.show(job_id)["fence"] == 2, "a new group without the frozen node", 60)
    for pid in (frozen.pid, *workers):
        os.kill(pid, signal.SIGCONT)
    job = check_finished(made, job_id)
    assert job["nodes"] == ["n0"]
    made.wait_ready(2)


def test_node_and_coordinator_killed_together(made: Cluster) -> None:
    job_id = made.submit(JOB)
    made.wait_step(job_id, 200)
    assert made.coordinator is not None
    made.coordinator.kill()
    made.nodes["n1"].kill()
    made.start_coordinator()
    check_finished(made, job_id)
