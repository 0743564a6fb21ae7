"""What is lost and how long it takes when something is killed: a worker in mid-training, the store in mid-commit."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from bench import store_kill
from bench.cluster import NODES, events, finished, metrics
from bench.paired import percentile
from bench.report import Bound, Figure, Finding, Gate
from bench.stage import Stage
from bench.workloads import DIGITS_CNN, write
from tests.e2e.cluster import Cluster, until

NOTHING = Gate(Bound.EXACTLY, 0)
STEPS = 2000
KILL_AT_STEP = 50


def store(stage: Stage) -> Finding:
    found = store_kill.run(stage.either(50, 3), stage.seed)
    figures = (
        Figure("acknowledged commits lost", found["lost"], gate=NOTHING, note=f"of {found['acknowledged']:.0f}"),
        Figure("damaged databases", found["damaged"], gate=NOTHING, note=f"after {found['rounds']:.0f} kill -9"),
    )
    return Finding("store_kill", figures, found)


def reform(stage: Stage) -> Finding:
    """kill -9 of one worker of a data_parallel job, to the next step that its new group commits."""
    runs = [_kill_one(stage, number) for number in range(stage.either(5, 1))]
    seconds = [run["seconds"] for run in runs]
    note = f"p50 of {len(seconds)}, least .. most"
    figure = Figure(
        "kill -9 of a worker -> next step", percentile(seconds, 0.5), "s", min(seconds), max(seconds), None, note
    )
    return Finding("reform", (figure,), {"runs": runs})


def _kill_one(stage: Stage, number: int) -> dict[str, Any]:
    cluster = stage.cluster()
    written = write(DIGITS_CNN.shortened(STEPS), "data_parallel", NODES, stage.subfolder("jobs"))
    job_id = cluster.submit(written.job, f"train.seed={stage.seed + number}")
    cluster.wait_step(job_id, KILL_AT_STEP)
    victim = NODES[number % len(NODES)]
    killed = time.time()
    for pid in _workers(cluster, victim):
        os.kill(pid, signal.SIGKILL)
    finished(cluster, job_id)
    stages = _stages(events(cluster, job_id), killed)
    regrouped = stages["held"]  # the survivor has stopped: whatever is committed later, a new group committed
    after = [record["time"] for record in metrics(cluster, job_id) if record["time"] > regrouped]
    if not after:
        raise AssertionError(f"{job_id} committed no step after the kill: give it more steps")
    return {"victim": victim, "seconds": min(after) - killed, "stages": {k: v - killed for k, v in stages.items()}}


def _workers(cluster: Cluster, name: str) -> list[int]:
    found: list[int] = until(lambda: cluster.worker_pids(name), f"{name} has a worker")
    return found


def _stages(log: list[dict[str, Any]], killed: float) -> dict[str, float]:
    """Unix times after the kill: both ranks have ended (`held`), the next offer, each rank's READY."""
    stages: dict[str, float] = {}
    attempts = [event for event in log if event["kind"] == "attempt" and event["time"] > killed]
    ended = [event["time"] for event in attempts if event["payload"]["state"] in ("FAILED", "LOST")]
    stages["held"] = max(ended)
    for event in attempts:
        if event["payload"]["state"] in ("OFFERED", "READY") and event["time"] >= stages["held"]:
            stages.setdefault(f"{event['payload']['state']} {event['payload']['rank']}", event["time"])
    return stages
