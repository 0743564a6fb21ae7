"""Many jobs at once, and a person's hand on them: all end, in order, and nothing is lost by stopping and going on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, until

JOBS = Path(__file__).parent / "jobs"
MANY = 20
STEPS = 600  # enough for a hand to come between
SAMPLES = (STEPS // 23) * 1438 + 64 * (STEPS % 23)  # builtin:digits has 1438 rows, 22 batches of 64 and one of 30

SUBMIT_MANY = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import hive, yaml
job = yaml.safe_load(open("mlp.yaml"))
def submit(number):
    return hive.submit({**job, "name": f"many-{number}", "strategy": "auto"}).id
with ThreadPoolExecutor(int(sys.argv[1])) as pool:
    print(json.dumps(list(pool.map(submit, range(int(sys.argv[1]))))))
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def made(two_nodes: Cluster) -> Cluster:
    two_nodes.heal()
    return two_nodes


def test_twenty_jobs_submitted_at_once_all_succeed_in_the_order_they_came(made: Cluster) -> None:
    made.wait(made.submit(JOBS / "mlp.yaml"))  # the model is identified and the workers are warm
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT_MANY, str(MANY)],
        cwd=JOBS,
        env=made.environment(made.home),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    job_ids = set(json.loads(done.stdout))
    assert len(job_ids) == MANY

    waiting = [job for job in made.ask("ps")["jobs"] if job["state"] == "QUEUED"]
    assert waiting, "twenty jobs cannot all run at once on two nodes"
    for job in waiting:
        assert (job["reason"], job["message"]) == ("waiting_for_busy_nodes", "all nodes are busy with earlier jobs")
    assert "all nodes are busy with earlier jobs" in made.hive("ps").stdout

    until(lambda: not made.jobs(), "all have ended", 240)
    every = {job["id"]: job for job in made.ask("ps", "--all")["jobs"]}
    assert job_ids <= every.keys(), "none is lost"
    assert {(every[job_id]["state"], every[job_id]["step"]) for job_id in job_ids} == {("SUCCEEDED", 50)}

    entered: dict[str, dict[str, int]] = {"PLANNING": {}, "STARTING": {}}
    for event in made.events():
        if event["kind"] == "job" and event["payload"]["state"] in entered and event["job_id"] in job_ids:
            entered[event["payload"]["state"]].setdefault(event["job_id"], event["seq"])
    came, began = entered["PLANNING"], entered["STARTING"]
    assert sorted(job_ids, key=came.__getitem__) == sorted(job_ids, key=began.__getitem__)


def test_running_and_queued_jobs_are_paused_resumed_and_cancelled(made: Cluster) -> None:
    running = made.submit(JOBS / "long.yaml", "train.steps=20000")
    queued = made.submit(JOBS / "long.yaml", "name=queued")
    made.wait_step(running, 50)
    assert made.wait_state(queued, "QUEUED")["message"] == "all nodes are busy with earlier jobs"

    assert made.ask("pause", queued)["job"]["state"] == "PAUSED"
    again = made.hive("pause", queued, check=False)
    assert again.returncode == 2 and "already paused" in again.stderr and "hive resume" in again.stderr
    assert made.hive("resume", running, check=False).returncode == 2
    assert made.ask("resume", queued)["job"]["state"] == "QUEUED"
    assert made.ask("cancel", queued)["job"]["state"] == "CANCELLED"
    assert made.hive("wait", queued, check=False).returncode == 103

    made.hive("pause", running)
    paused = made.wait_state(running, "PAUSED")
    assert paused["step"] >= 50 and "hive resume" in paused["message"]
    assert {node["activity"] for node in made.show_nodes()} == {"IDLE"}
    made.hive("resume", running)
    assert made.wait_step(running, paused["step"] + 50)["fence"] == 2
    made.hive("cancel", running)
    ended = made.wait(running)
    assert (ended["state"], ended["reason"], ended["exit_code"]) == ("CANCELLED", "cancelled_by_user", 103)
    assert made.hive("cancel", running, check=False).returncode == 2
    until(lambda: {n["activity"] for n in made.show_nodes()} == {"IDLE"}, "the nodes are free again")


def test_a_cancelled_job_whose_code_hangs_frees_its_nodes(made: Cluster) -> None:
    job_id = made.submit(JOBS / "long.yaml", "model.source=model.py:sleeps", "strategy=single_node")
    made.wait_step(job_id, 1)
    made.hive("cancel", job_id)
    assert made.wait(job_id)["state"] == "CANCELLED"
    until(lambda: not made.worker_pids("n0") + made.worker_pids("n1"), "the hanging worker is gone", 20)
    assert made.wait(made.submit(JOBS / "mlp.yaml"))["state"] == "SUCCEEDED"


def test_a_pause_and_a_restart_of_the_coordinator_leave_no_trace_in_the_losses(made: Cluster) -> None:
    straight = made.submit(JOBS / "long.yaml", f"train.steps={STEPS}")
    broken = made.submit(JOBS / "long.yaml", f"train.steps={STEPS}")
    assert made.wait(straight)["state"] == "SUCCEEDED"
    made.wait_step(broken, 100)
    made.hive("pause", broken)
    step = made.wait_state(broken, "PAUSED")["step"]
    assert 100 <= step < STEPS
    assert made.coordinator is not None
    made.coordinator.kill()
    made.start_coordinator()
    assert made.wait_state(broken, "PAUSED")["step"] == step
    made.wait_ready(2)
    made.hive("resume", broken)
    ended = made.wait(broken)
    assert (ended["state"], ended["step"], ended["fence"]) == ("SUCCEEDED", STEPS, 2)
    losses = {job_id: [line["loss"] for line in made.metrics(job_id)] for job_id in (straight, broken)}
    assert len(losses[straight]) == STEPS
    assert losses[broken] == pytest.approx(losses[straight], abs=1e-5)


def test_a_node_that_is_told_to_end_hands_its_work_over(made: Cluster) -> None:
    job_id = made.submit(JOBS / "long.yaml", f"train.steps={STEPS}")
    made.wait_step(job_id, 100)
    assert made.nodes["n1"].end() == 0
    ended = made.wait(job_id)
    assert (ended["state"], ended["nodes"], ended["samples"]) == ("SUCCEEDED", ["n0"], SAMPLES), ended
    (gone,) = [node for node in made.show_nodes() if node["name"] == "n1"]
    assert gone["link"] == "LEFT"


def test_a_node_that_leaves_for_good_is_gone_and_its_work_goes_on(made: Cluster) -> None:
    made.start_node("guest")
    made.wait_ready(3)
    job_id = made.submit(JOBS / "long.yaml", "nodes.require.names=[guest, n0]", f"train.steps={STEPS}")
    made.wait_step(job_id, 100)
    made.hive_node("guest", "leave")
    guest = made.nodes.pop("guest")
    assert guest.process is not None and guest.process.wait(30) == 0
    ended = made.wait(job_id)
    assert (ended["state"], ended["nodes"], ended["step"]) == ("SUCCEEDED", ["n0"], STEPS), ended
    assert not (guest.home / "node" / "credential.json").exists()
    (gone,) = [node for node in made.show_nodes() if node["name"] == "guest"]
    assert gone["link"] == "LEFT"
