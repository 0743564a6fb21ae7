"""Whatever is killed or frozen during training, the job ends SUCCEEDED with every sample counted once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from coordinator import connect
from tests.e2e.cluster import Cluster, until

JOB = Path(__file__).parent / "jobs" / "long.yaml"
STEPS = 900  # the faults come at step 200
ROWS = 1438  # of builtin:digits' training part
LONG = f"train.steps={STEPS}"
SAMPLES = (STEPS // 23) * ROWS + sum([64] * (STEPS % 23))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def made(two_nodes: Cluster) -> Cluster:
    two_nodes.heal()
    return two_nodes


def kill_coordinator_when(made: Cluster, job_id: str, states: set[str]) -> None:
    """kill -9 as soon as the job is seen in one of these states, which last a moment: asked again and again over one
    connection. Then start it again."""

    async def reached() -> None:
        async with asyncio.timeout(60), await connect.connect(connect.load(environment=environment)) as client:
            while (await client.show(job_id))["job"]["state"] not in states:
                pass

    environment = made.environment(made.home)
    asyncio.run(reached())
    assert made.coordinator is not None
    made.coordinator.kill()
    made.start_coordinator()


def check_finished(made: Cluster, job_id: str) -> dict[str, object]:
    job = made.wait(job_id, 180)
    assert job["state"] == "SUCCEEDED", job
    assert job["step"] == STEPS
    assert job["samples"] == SAMPLES
    lines = [json.loads(line) for line in made.artifact(job_id, "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["stage"] == "train"]
    assert len(steps) == len(set(steps)), "a step was counted twice"
    assert (steps[0], steps[-1]) == (1, STEPS)
    assert lines[-1]["samples"] == SAMPLES
    return job


def test_a_killed_worker_costs_no_committed_step(made: Cluster) -> None:
    job_id = made.submit(JOB, LONG)
    made.wait_step(job_id, 200)
    os.kill(made.worker_pids("n1")[0], signal.SIGKILL)
    job = check_finished(made, job_id)
    assert job["fence"] == 2


def test_a_killed_node_daemon_leaves_its_work_to_the_other(made: Cluster) -> None:
    job_id = made.submit(JOB, LONG)
    made.wait_step(job_id, 200)
    made.nodes["n1"].kill()
    job = check_finished(made, job_id)
    assert job["nodes"] == ["n0"]


def test_a_coordinator_killed_while_the_group_forms(made: Cluster) -> None:
    job_id = made.submit(JOB, LONG)
    kill_coordinator_when(made, job_id, {"STARTING"})
    check_finished(made, job_id)


def test_a_coordinator_killed_while_the_group_is_formed_again(made: Cluster) -> None:
    job_id = made.submit(JOB, LONG)
    made.wait_step(job_id, 200)
    os.kill(made.worker_pids("n1")[0], signal.SIGKILL)
    kill_coordinator_when(made, job_id, {"RECOVERING", "QUEUED", "STARTING"})
    check_finished(made, job_id)


def test_a_coordinator_killed_when_the_result_arrives(made: Cluster) -> None:
    job_id = made.submit(JOB, LONG)
    made.wait_step(job_id, STEPS // 2)  # what is reported lags behind by half a second
    assert made.coordinator is not None
    made.coordinator.kill()
    until(lambda: not made.worker_pids("n0"), "the workers have finished without a coordinator", 60)
    made.start_coordinator()
    job = check_finished(made, job_id)
    assert job["fence"] == 1
    assert made.artifact(job_id, "model.safetensors").stat().st_size > 0


def test_a_killed_coordinator_is_a_non_event(made: Cluster) -> None:
    job_id = made.submit(JOB, LONG)
    made.wait_step(job_id, 200)
    assert made.coordinator is not None
    made.coordinator.kill()
    made.start_coordinator()
    job = check_finished(made, job_id)
    assert job["fence"] == 1


def test_a_frozen_node_is_left_behind_and_fenced_off_when_it_wakes(made: Cluster) -> None:
    job_id = made.submit(JOB, LONG)
    made.wait_step(job_id, 200)
    frozen = made.nodes["n1"]
    workers = made.worker_pids("n1")
    for pid in (frozen.pid, *workers):
        os.kill(pid, signal.SIGSTOP)
    without = until(lambda: (job := made.show(job_id))["fence"] == 2 and job, "a new group without the frozen node", 60)
    assert without["nodes"] == ["n0"]
    made.hive("node", "cordon", "n1")  # else the job may take it back under a later fence, as soon as that pays
    try:
        for pid in (frozen.pid, *workers):
            os.kill(pid, signal.SIGCONT)
        until(lambda: not set(workers) & set(made.worker_pids("n1")), "the workers of the old fence have ended", 60)
        job = check_finished(made, job_id)
    finally:
        made.hive("node", "uncordon", "n1")
    assert job["nodes"] == ["n0"]
    attempts = made.ask("show", job_id)["attempts"]
    assert {each["state"] for each in attempts if each["node"] == "n1"} == {"LOST"}, "its late reports change nothing"
    assert {each["fence"] for each in attempts if each["node"] == "n1"} == {1}
    assert {each["node"] for each in attempts if each["fence"] > 1} == {"n0"}
    made.wait_ready(2)


def test_node_and_coordinator_killed_together(made: Cluster) -> None:
    job_id = made.submit(JOB, LONG)
    made.wait_step(job_id, 200)
    assert made.coordinator is not None
    made.coordinator.kill()
    made.nodes["n1"].kill()
    made.start_coordinator()
    check_finished(made, job_id)


def test_a_job_that_only_a_paused_node_can_have_waits_for_it_also_over_a_restart(made: Cluster) -> None:
    made.hive_node("n1", "pause")
    until(lambda: {n["name"]: n["activity"] for n in made.show_nodes()}["n1"] == "PAUSED", "n1 is paused", 30)
    job_id = made.submit(JOB, LONG, "strategy=single_node", "nodes.require.names=[n1]")
    until(lambda: made.show(job_id)["reason"] == "waiting_for_nodes", f"{job_id} waits", 60)
    assert made.coordinator is not None
    made.coordinator.kill()
    made.start_coordinator()
    until(lambda: "n0" in [n["name"] for n in made.show_nodes() if n["link"] == "CONNECTED"], "n0 is back", 60)
    made.hive_node("n1", "resume")
    job = check_finished(made, job_id)
    assert job["nodes"] == ["n1"]
