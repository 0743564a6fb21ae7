"""A node that is drained hands over what it has trained: no step is trained twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, until

JOB = Path(__file__).parent / "jobs" / "long.yaml"
STEPS = 900
NEVER = "checkpoint.every_s=3600"  # what is not handed over is lost

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def made(two_nodes: Cluster) -> Iterator[Cluster]:
    two_nodes.heal()
    yield two_nodes
    for name in two_nodes.nodes:
        two_nodes.hive("node", "uncordon", name)


def steps_trained(made: Cluster, job_id: str) -> int:
    """By the ranks 0 of all groups, those that were lost again included."""
    report = json.loads(made.artifact(job_id, "report.json").read_text())
    used = [attempt for node in report["nodes"].values() for attempt in node["attempts"]]
    return sum(attempt["steps"] for attempt in used if attempt["rank"] == 0)


def test_no_committed_step_of_a_drained_node_is_lost(made: Cluster) -> None:
    job_id = made.submit(JOB, f"train.steps={STEPS}", NEVER, "strategy=single_node")
    (drained,) = made.wait_step(job_id, 100)["nodes"]
    made.hive("node", "drain", drained)
    job = until(lambda: (job := made.show(job_id))["fence"] == 2 and job, "a new group without the drained node", 60)
    assert drained not in job["nodes"]
    job = made.wait(job_id, 180)
    assert job["state"] == "SUCCEEDED", job
    assert steps_trained(made, job_id) == STEPS
