"""The clusters that benchmarks run on: the processes of tests/e2e, and what a benchmark asks of a job afterwards.

Owns the figures read from a job's own documents (report.json, metrics.jsonl, events): hive is timed by what it reports
of itself only where a peer is timed by its own clock too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.strategy_report import Run, run_of
from bench.workloads import Written
from tests.e2e.cluster import Cluster

NODES = ("n0", "n1")
MEMORY = "3GiB"
COORDINATOR = "coordinator.cli.main"
JOB_DEADLINE_S = 900.0
PEERS = Path(__file__).resolve().parent / "peers"


@contextmanager
def running(
    folder: Path,
    nodes: Sequence[str] = NODES,
    threads: int = 1,
    cpus: Mapping[str, float] | None = None,
    program: str = COORDINATOR,
) -> Iterator[Cluster]:
    """A coordinator and nodes on loopback, measured and idle, each granted as many cores as it may use threads, or as
    `cpus` says by its name. `program`: the module that starts the coordinator."""
    made = Cluster(folder, program=program)
    try:
        made.start_coordinator()
        for name in nodes:
            made.start_node(name, (cpus or {}).get(name, threads), MEMORY)
        if nodes:
            made.wait_ready(len(nodes), 300.0)
        yield made
    finally:
        made.close()


def run_job(cluster: Cluster, written: Written, *sets: str) -> dict[str, Any]:
    """`hive submit --wait`, and report.json. Raises AssertionError when the job did not succeed. `sets`: KEY=VALUE.

    One client from submission to end: the start of a second one would load the machine while the job is timed.
    """
    flags = [part for each in sets for part in ("--set", each)]
    answer = cluster.ask("submit", str(written.job), "--wait", *flags, deadline_s=JOB_DEADLINE_S)
    job_id = str(answer["job"]["id"])
    report: dict[str, Any] = json.loads(cluster.artifact(job_id, "report.json").read_text())
    return report


def run_timed(cluster: Cluster, written: Written, *sets: str) -> Run:
    """As run_job; the steps of the job beside what was predicted of them."""
    report = run_job(cluster, written, *sets)
    return run_of(report, metrics(cluster, report["job"]["id"]))


def finished(cluster: Cluster, job_id: str) -> dict[str, Any]:
    job = cluster.wait(job_id, JOB_DEADLINE_S)
    if job["state"] != "SUCCEEDED":
        raise AssertionError(f"{job_id} ended {job['state']}: {job['message']}")
    return job


def loop_samples_per_s(report: dict[str, Any]) -> float:
    """Samples of the whole job over the seconds that its slowest rank spent in the training loop."""
    attempts = [attempt for node in report["nodes"].values() for attempt in node["attempts"]]
    seconds = max(attempt["seconds"] for attempt in attempts)
    return float(report["job"]["samples"]) / float(seconds)


def metrics(cluster: Cluster, job_id: str) -> list[dict[str, Any]]:
    lines = cluster.artifact(job_id, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def events(cluster: Cluster, job_id: str) -> list[dict[str, Any]]:
    lines = cluster.hive("events", "--job", job_id, "-o", "json").stdout.splitlines()
    return [json.loads(line) for line in lines]


def run_peer(command: Sequence[str], threads: int) -> dict[str, Any]:
    """A peer's script in its own process; the last line it printed. Raises AssertionError when it failed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HIVE_")}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=JOB_DEADLINE_S, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def plain_loop(written: Written, threads: int) -> dict[str, Any]:
    return run_peer([sys.executable, str(PEERS / "plain_loop.py"), str(written.peer), str(threads)], threads)


def torchrun_ddp(written: Written, ranks: int, threads: int) -> dict[str, Any]:
    return torchrun("torchrun_ddp.py", written, ranks, threads)


def torchrun(script: str, written: Written, ranks: int, threads: int, *arguments: str) -> dict[str, Any]:
    """A peer's script on so many ranks. With `begun`: the Unix time at which torchrun was started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(ranks), str(PEERS / script), str(written.peer), str(threads), *arguments]
    begun = time.time()
    return run_peer(command, threads) | {"begun": begun}
