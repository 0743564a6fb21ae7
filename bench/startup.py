"""From the command to the first training step: `hive submit` with warm workers beside `torchrun`.

hive's clock starts before the `hive submit` process and ends at the time rank 0 wrote down for step 1. Each submit has
another seed, so the coordinator has seen no such job before and identifies the model again. torchrun's starts before
its process and ends after the first optimizer step. All on one machine, so one clock.
"""

from __future__ import annotations

import time
from typing import Any

from bench.cluster import NODES, events, finished, metrics, torchrun_ddp
from bench.paired import percentile
from bench.report import Bound, Figure, Finding, Gate
from bench.stage import Stage
from bench.workloads import DIGITS_CNN, write

GATE = Gate(Bound.BELOW, 1.0)
STEPS = 20


def first_step(stage: Stage) -> Finding:
    figures: list[Figure] = []
    detail: dict[str, Any] = {}
    for strategy, nodes in (("data_parallel", NODES), ("single_node", NODES[:1])):
        runs = [_submit(stage, strategy, nodes, number) for number in range(stage.either(21, 4))][1:]
        seconds = [run["seconds"] for run in runs]
        gate = GATE if strategy == "data_parallel" else None
        figures.append(_figure(f"hive submit -> step 1, {strategy}", seconds, gate))
        accepted = [run["seconds"] - run["stages"]["accepted"] for run in runs]
        figures.append(_figure(f"  of it after the coordinator accepted, {strategy}", accepted, None))
        detail[strategy] = runs
    written = write(DIGITS_CNN.shortened(STEPS), "data_parallel", NODES, stage.subfolder("jobs"))
    peers = [torchrun_ddp(written, len(NODES), stage.threads) for _ in range(stage.either(7, 2))]
    waits = [float(peer["first_step"]) - float(peer["begun"]) for peer in peers]
    figures.append(_figure("torchrun -> step 1", waits, None))
    return Finding("first_step", tuple(figures), detail | {"torchrun": waits})


def _figure(name: str, seconds: list[float], gate: Gate | None) -> Figure:
    low, high = percentile(seconds, 0.05), percentile(seconds, 0.95)
    return Figure(name, percentile(seconds, 0.5), "s", low, high, gate, f"p50 of {len(seconds)}, p5 .. p95")


def _submit(stage: Stage, strategy: str, nodes: tuple[str, ...], number: int) -> dict[str, Any]:
    """One job: seconds to its first step, and when (seconds after the command) each stage on the way was reached."""
    cluster = stage.cluster()
    written = write(DIGITS_CNN.shortened(STEPS), strategy, nodes, stage.subfolder("jobs"))
    begun = time.time()
    job_id = cluster.submit(written.job, f"train.seed={stage.seed + number}")
    finished(cluster, job_id)
    first = next(record for record in metrics(cluster, job_id) if record["step"] == 1)
    stages = {"accepted": 0.0}
    for event in events(cluster, job_id):
        payload = event["payload"]
        if event["kind"] == "job" and "state" in payload:
            name = "accepted" if payload["state"] == "PLANNING" else payload["state"]
            stages.setdefault(name, 0.0)
            stages[name] = stages[name] or event["time"] - begun
        elif event["kind"] == "attempt":
            stages.setdefault(f"{payload['state']} {payload['rank']}", event["time"] - begun)
    return {"seconds": first["time"] - begun, "stages": stages}
