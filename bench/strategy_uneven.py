"""What cutting by speed is worth: hive's own uneven plan beside an equal one, on two nodes of which one has a quarter
of the other's CPU.

Both sides are hive: the same coordinator, nodes, caps, engine, number of micro-batches and steps. The equal side is a
job whose name makes the coordinator take the nodes for equals (bench/strategy_equal_coordinator.py). A round is equal,
own, equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench.cluster import run_job, run_timed, running
from bench.paired import Round, compare
from bench.report import Bound, Figure, Finding, Gate, ratio_figures
from bench.stage import Stage
from bench.strategy_equal_coordinator import EQUAL
from bench.strategy_jobs import pipeline
from bench.strategy_report import Run
from bench.workloads import GPT_10M, Strategy, Written, write
from tests.e2e.cluster import Cluster

GATE = Gate(Bound.AT_LEAST, 1.6)
CPUS = {"fast": 1.0, "slow": 0.25}
BATCH = 24
MICRO_BATCHES = 8
STRATEGIES: tuple[Strategy, ...] = ("data_parallel", pipeline(len(CPUS), MICRO_BATCHES))


def uneven(stage: Stage) -> Finding:
    figures: list[Figure] = []
    detail: dict[str, Any] = {}
    workload = replace(GPT_10M, batch=BATCH, steps=stage.either(5, 2))
    with running(
        stage.subfolder("uneven"), tuple(CPUS), stage.threads, CPUS, program="bench.strategy_equal_coordinator"
    ) as cluster:
        for strategy in STRATEGIES:
            own = write(workload, strategy, tuple(CPUS), stage.subfolder("jobs"))
            equal = write(workload, strategy, tuple(CPUS), stage.subfolder("jobs"), EQUAL)
            name = strategy if isinstance(strategy, str) else next(iter(strategy))
            rounds, detail[name] = _rounds(stage, cluster, name, own, equal)
            figures += ratio_figures(f"{name}: own cut / equal cut", compare(rounds, stage.seed), GATE)
            last = detail[name][-1]
            figures.append(Figure(f"{name}: own step", last["own"]["measured_s"], "s", note=str(last["own"]["cut"])))
            figures.append(
                Figure(f"{name}: equal step", last["after"]["measured_s"], "s", note=str(last["after"]["cut"]))
            )
    return Finding("uneven", tuple(figures), detail)


def _rounds(
    stage: Stage, cluster: Cluster, name: str, own: Written, equal: Written
) -> tuple[list[Round], list[dict[str, Any]]]:
    rounds, runs = [], []
    run_job(cluster, own)  # the first job starts the warm parents
    names = {node["id"]: node["name"] for node in cluster.show_nodes()}
    for number in range(stage.rounds):
        before, candidate, after = (run_timed(cluster, written) for written in (equal, own, equal))
        rounds.append(Round(1 / before.measured_s, 1 / candidate.measured_s, 1 / after.measured_s))
        kinds = {"before": before, "own": candidate, "after": after}
        runs.append({kind: _plain(run, names) for kind, run in kinds.items()} | {"ratio": rounds[-1].ratio})
        stage.tell(
            f"{name}, round {number + 1} of {stage.rounds}: equal {before.measured_s:.2f}, own "
            f"{candidate.measured_s:.2f}, equal {after.measured_s:.2f} s a step, ratio {rounds[-1].ratio:.2f}"
        )
    return rounds, runs


def _plain(run: Run, names: Mapping[str, str]) -> dict[str, Any]:
    """`cut`: of each node its samples and layers."""
    parts = (
        f"{names[node]}: samples {samples[1] - samples[0]}, layers {layers[0]} to {layers[1]}"
        for node, samples, layers, _ in run.cut
    )
    return {"measured_s": run.measured_s, "predicted_s": run.predicted_s, "cut": "; ".join(parts)}
