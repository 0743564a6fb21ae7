"""Training speed beside plain torch, and beside torchrun with DistributedDataParallel. Steady state of the loop only.

A round is peer, hive, peer: each in processes of its own, the same model, data, batch, steps, optimizer and threads.
Each times its own training loop, first step to last, warm-up included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.cluster import NODES, loop_samples_per_s, plain_loop, run_job, torchrun_ddp
from bench.paired import Round, compare
from bench.report import Bound, Figure, Finding, Gate, ratio_figures
from bench.stage import Stage
from bench.workloads import DIGITS_CNN, GPT_10M, Workload, Written, write
from tests.e2e.cluster import Cluster

GATE = Gate(Bound.AT_LEAST, 0.97)
QUICK_STEPS = {DIGITS_CNN.name: 200, GPT_10M.name: 3}
Peer = Callable[[Written], dict[str, Any]]


def single_node(stage: Stage) -> Finding:
    return _against(stage, "single_node", NODES[:1], 1, lambda written: plain_loop(written, stage.threads))


def data_parallel(stage: Stage) -> Finding:
    """Each rank has the batch that a single node has."""
    ranks = len(NODES)
    return _against(stage, "data_parallel", NODES, ranks, lambda written: torchrun_ddp(written, ranks, stage.threads))


def _against(stage: Stage, strategy: str, nodes: tuple[str, ...], ranks: int, peer: Peer) -> Finding:
    figures: list[Figure] = []
    detail: dict[str, Any] = {}
    for workload in (DIGITS_CNN, GPT_10M):
        if stage.workload not in (None, workload.data):
            continue
        steps = QUICK_STEPS[workload.name] if stage.quick else workload.steps
        sized = replace(workload, batch=workload.batch * ranks, steps=steps)
        written = write(sized, strategy, nodes, stage.subfolder("jobs"))
        rounds, runs = interleaved(stage, stage.cluster(), written, peer)
        figures += compared(stage, workload.name, sized, rounds, GATE)
        detail[workload.name] = runs
    return Finding(strategy, tuple(figures), detail)


def compared(stage: Stage, name: str, workload: Workload, rounds: list[Round], gate: Gate | None) -> list[Figure]:
    """The ratio, its control, and what the peer's step took."""
    step_ms = 1e3 * workload.batch / max(max(each.before, each.after) for each in rounds)
    ratios = ratio_figures(name, compare(rounds, stage.seed), gate)
    return [*ratios, Figure(f"{name}: peer's best step", step_ms, "ms")]


def interleaved(
    stage: Stage, cluster: Cluster, written: Written, peer: Peer
) -> tuple[list[Round], list[dict[str, Any]]]:
    """Peer, hive, peer, as often as the stage asks; samples/s, and everything of each run."""
    rounds, runs = [], []
    run_job(cluster, written)  # the first job starts the warm parent, which imports torch
    for number in range(stage.rounds):
        before = peer(written)
        report = run_job(cluster, written)
        after = peer(written)
        rounds.append(Round(_rate(before), loop_samples_per_s(report), _rate(after)))
        runs.append({"before": before, "after": after, "hive": _of_report(report), "ratio": rounds[-1].ratio})
        stage.tell(
            f"{written.workload.name}, round {number + 1} of {stage.rounds}: "
            f"{rounds[-1].before:.0f}, hive {rounds[-1].candidate:.0f}, {rounds[-1].after:.0f} samples/s, "
            f"ratio {rounds[-1].ratio:.3f}"
        )
    return rounds, runs


def _rate(answer: dict[str, Any]) -> float:
    return float(answer["samples"]) / float(answer["seconds"])


def _of_report(report: dict[str, Any]) -> dict[str, Any]:
    kept = ("samples", "steps", "seconds", "compute_s", "sync_s")
    nodes = {name: {key: node["attempts"][-1][key] for key in kept} for name, node in report["nodes"].items()}
    return {"samples": report["job"]["samples"], "loss": report["metrics"].get("loss"), "nodes": nodes}
