"""What a person does on one machine, in order: up, nodes, plan, submit, look, wait, fetch, load; the same in Python."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, until

ROOT = Path(__file__).parents[2]
MLP = ROOT / "examples" / "digits" / "mlp.yaml"
JOBS = Path(__file__).parent / "jobs"
HIVE = [sys.executable, "-m", "coordinator.cli.main"]
NAMES = ["local-1", "local-2"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`hive up --nodes 2` in a home of its own; Ctrl-C ends it all."""
    folder = tmp_path_factory.mktemp("up")
    made = Cluster(folder)
    log = (folder / "up.log").open("w")
    running = subprocess.Popen(
        [*HIVE, "up", "--nodes", "2", "--port", "0", "--session-port", "0", "-o", "json"],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=made.environment(made.home),
    )
    try:
        assert running.stdout is not None
        said = json.loads(running.stdout.readline())["up"]
        assert (said["nodes"], said["home"]) == (NAMES, str(made.home))
        made.address = said["address"]

        def measured() -> bool:
            return [node["activity"] for node in made.show_nodes()] == ["IDLE", "IDLE"]

        until(measured, "both nodes have measured how fast they are", 120)
        yield made
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(60)
        log.close()
    assert running.returncode == 0, (folder / "up.log").read_text()


@pytest.fixture(scope="module")
def planned(up: Cluster) -> dict[str, Any]:
    """Before any job has taught the planner how fast the nodes are."""
    return dict(up.ask("plan", str(MLP), "--set", "strategy=data_parallel"))


@pytest.fixture(scope="module")
def job(up: Cluster, planned: dict[str, Any]) -> dict[str, Any]:
    """The digits example, trained on both nodes while somebody waits."""
    return dict(up.ask("submit", str(MLP), "--wait", "--set", "strategy=data_parallel")["job"])


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_machines_are_listed_with_what_they_have(up: Cluster) -> None:
    shown = up.ask("nodes")["nodes"]
    assert [node["name"] for node in shown] == NAMES
    for node in shown:
        assert (node["link"], node["eligibility"]) == ("CONNECTED", "OK")
        assert node["capacity"]["cores"] > 0 and node["capacity"]["memory_bytes"] > 0
        assert node["capacity"]["flops"]["fp32"]["p50"] > 0
        assert node["rtt_s"] > 0 and node["bandwidth_mbps"] > 0
    table = up.hive("nodes").stdout
    assert all(word in table for word in ("NODE", "GFLOP/S", "RTT", *NAMES))


def test_the_plan_that_is_printed_is_what_is_executed(
    up: Cluster, job: dict[str, Any], planned: dict[str, Any]
) -> None:
    assert planned["model"]["family"] == "mlp" and planned["model"]["parameters"] == 26122
    assert {each["strategy"] for each in planned["plan"]["candidates"]} >= {"single_node", "data_parallel"}
    explained = up.ask("explain", job["id"])
    assert job["strategy"] == explained["plan"]["strategy"] == planned["plan"]["strategy"]
    assert explained["plan"]["subtasks"] == planned["plan"]["subtasks"]
    assert explained["plan"]["coordination_plan"] == planned["plan"]["coordination_plan"]
    for name in ("seconds", "step_s", "bytes", "memory_bytes"):
        assert explained["measured"][name] > 0

    report = json.loads(up.artifact(job["id"], "report.json").read_text())
    assert report["plan"] == explained["plan"]
    names = {node["id"]: node["name"] for node in up.show_nodes()}
    ran = {(attempt["rank"], attempt["node"]) for attempt in report["attempts"]}
    assert ran == {(each["rank"], names[each["node_id"]]) for each in explained["plan"]["subtasks"]}
    assert up.hive("plan", str(MLP)).stdout.startswith("model     mlp")
    assert "measured" in up.hive("explain", job["id"]).stdout


def test_the_trained_job_is_shown(up: Cluster, job: dict[str, Any]) -> None:
    assert (job["state"], job["reason"], job["exit_code"]) == ("SUCCEEDED", "finished", 0)
    assert job["metrics"]["accuracy"] > 0.9
    assert sorted(job["nodes"]) == NAMES
    assert (job["samples"], job["step"], job["steps_total"]) == (15 * 1438, 345, 345)
    assert {"model.safetensors", "metrics.jsonl", "report.json"} == {each["name"] for each in job["artifacts"]}
    assert job["model"] == {"source": "model.py:mlp", "args": {"hidden": 128}}
    assert [each["name"] for each in job["code"]] == ["model.py"]
    assert {**up.ask("show", job["id"])["job"], "seq": 0} == {**job, "seq": 0}
    assert job["id"] in up.hive("ps", "--all").stdout
    assert "accuracy" in up.hive("show", job["id"]).stdout
    assert up.hive("wait", job["id"]).returncode == 0


def test_metrics_have_every_field_of_every_step(up: Cluster, job: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in up.artifact(job["id"], "metrics.jsonl").read_text().splitlines()]
    fields = {"time", "step", "epoch", "stage", "loss", "accuracy", "samples_per_s", "bytes_sent", "convergence_rate"}
    assert all(line.keys() >= {*fields, "node"} for line in lines)
    trained = [line for line in lines if line["stage"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, 346))
    assert trained[-1]["loss"] < trained[0]["loss"] and trained[-1]["bytes_sent"] > 0
    evaluated = [line for line in lines if line["stage"] == "evaluate"]
    assert [line["step"] for line in evaluated] == [23 * epoch for epoch in range(1, 16)]
    assert evaluated[-1]["accuracy"] == pytest.approx(job["metrics"]["accuracy"])


def test_the_printed_lines_load_the_model_in_a_fresh_python(up: Cluster, job: dict[str, Any], tmp_path: Path) -> None:
    got = up.hive("artifacts", "get", job["id"], str(tmp_path))
    lines = got.stdout.strip().splitlines()
    assert len(lines) == 3 and "load_model" in lines[2]
    done = python("\n".join([*lines, "print(sum(p.numel() for p in model.parameters()))"]))
    assert (done.returncode, done.stdout.strip()) == (0, "26122"), done.stderr
    listed = up.ask("artifacts", "list", job["id"])["artifacts"]
    assert listed == job["artifacts"]


def test_events_tell_the_story_and_go_on_where_one_stopped(up: Cluster, job: dict[str, Any]) -> None:
    told = up.events("--job", job["id"])
    assert [each["seq"] for each in told] == sorted({each["seq"] for each in told})
    states = [each["payload"]["state"] for each in told if each["kind"] == "job"]
    assert list(dict.fromkeys(states)) == ["SUBMITTED", "PLANNING", "QUEUED", "STARTING", "RUNNING", "SUCCEEDED"]
    assert all(each["payload"]["message"] for each in told if each["kind"] == "job")
    assert {"decision", "outcome", "attempt", "progress"} <= {each["kind"] for each in told}
    middle = told[len(told) // 2]["seq"]
    assert up.events("--job", job["id"], "--after", str(middle)) == [each for each in told if each["seq"] > middle]

    last = up.events()[-1]["seq"]
    watching = subprocess.Popen(
        [*HIVE, "events", "-w", "--after", str(last), "-o", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=up.environment(up.home),
    )
    made = up.submit(JOBS / "mlp.yaml")
    assert watching.stdout is not None
    seen: list[dict[str, Any]] = []
    while not (seen and seen[-1]["kind"] == "job" and seen[-1]["payload"]["state"] == "SUCCEEDED"):
        seen.append(json.loads(watching.stdout.readline()))
    watching.send_signal(signal.SIGINT)
    # what else happened until the signal arrived; communicate would not see what readline has read ahead
    seen += [json.loads(line) for line in watching.stdout]
    assert watching.stderr is not None
    said = watching.stderr.read()
    watching.wait(30)
    assert watching.returncode == 130 and f"hive events -w --after {seen[-1]['seq']}" in said
    assert [each["seq"] for each in seen] == list(range(last + 1, seen[-1]["seq"] + 1))
    assert seen[0]["job_id"] == made


def test_logs_are_followed_to_the_end_and_a_sample_is_shown(up: Cluster) -> None:
    job_id = up.submit(JOBS / "mlp.yaml", "model.source=talkative.py:build", "strategy=single_node")
    followed = up.hive("logs", job_id, "-f")
    assert (followed.returncode, followed.stdout) == (0, "built\nthe sample: 10\n")
    assert up.hive("logs", job_id).stdout == followed.stdout
    waited = up.hive("submit", str(JOBS / "mlp.yaml"), "--wait", "--set", "model.source=talkative.py:build")
    assert "the sample: 10\n" in waited.stderr and "the sample" not in waited.stdout


def test_tokens_doctor_and_completion(up: Cluster) -> None:
    made = up.ask("token", "create", "--role", "node", "--uses", "2")["token"]
    assert made["join"].startswith(f"hive-node start --coordinator {up.address} --token hive1.")
    assert made["id"] in {each["id"] for each in up.ask("token", "list")["tokens"]}
    up.hive("token", "revoke", made["id"])
    assert made["id"] not in {each["id"] for each in up.ask("token", "list")["tokens"]}
    checks = up.ask("doctor")["checks"]
    assert checks and all(check["ok"] for check in checks), checks
    for shell in ("bash", "zsh", "fish"):
        assert "_HIVE_COMPLETE" in up.hive("completion", shell).stdout


def test_the_same_in_one_line_of_python(up: Cluster) -> None:
    code = "import hive; job = hive.submit('job.yaml'); job.wait(); print(job.metrics()[-1])"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("job.yaml", str(JOBS / "mlp.yaml"))],
        env=up.environment(up.home),
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert "'step': 50" in done.stdout and "'loss'" in done.stdout


def test_the_owner_of_a_node_looks_after_it(up: Cluster) -> None:
    environment = up.environment(up.home / "nodes" / "local-1")

    def owner(*arguments: str) -> str:
        return up.run(["node.cli", *arguments], environment, deadline_s=150).stdout

    assert json.loads(owner("status", "-o", "json"))["node"]["name"] == "local-1"
    owner("pause")
    (paused,) = [node for node in up.show_nodes() if node["name"] == "local-1"]
    assert paused["activity"] == "PAUSED" and "owner" in paused["reason"]
    alone = up.ask("submit", str(JOBS / "mlp.yaml"), "--wait", "--set", "strategy=auto")["job"]
    assert alone["nodes"] == ["local-2"]
    owner("resume")
    until(lambda: {node["activity"] for node in up.show_nodes()} == {"IDLE"}, "it works again")
    checks = json.loads(owner("doctor", "-o", "json"))["checks"]
    assert {"session", "cpu cap", "memory cap"} <= {check["name"] for check in checks}
    assert all(check["ok"] for check in checks), checks
    shown = json.loads(owner("config", "show", "--sources", "-o", "json"))
    assert shown["sources"]["name"] == "default"
    unit = owner("install", "--print", "--cpus", "0.5", "--allow-root")
    assert "ExecStart=" in unit and "--cpus 0.5" in unit and "hive1." not in unit


def test_bench_measures_again(up: Cluster) -> None:
    environment = up.environment(up.home / "nodes" / "local-2")
    measured = json.loads(up.run(["node.cli", "bench", "-o", "json"], environment, deadline_s=150).stdout)
    assert measured["capacity"]["flops"]["fp32"]["p50"] > 0
