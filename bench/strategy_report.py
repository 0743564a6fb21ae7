"""Prediction and measurement of one job, side by side, out of its report.json and metrics.jsonl. Pure.

A step's measured time is the mean from the end of the first step to the end of the last: what a job of many steps waits
for, stalls under a CPU cap included, without what only a first step does. Memory is what a worker used above what it
used before the model was built; the plan's figure holds RESERVE_BYTES for that, for each rank of a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from strategies.memory import RESERVE_BYTES


@dataclass(frozen=True, slots=True)
class Memory:
    """Of all ranks of one node together, above their baseline."""

    node: str
    predicted_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        return relative_error(self.predicted_bytes, self.measured_bytes)


@dataclass(frozen=True, slots=True)
class Run:
    """`median_s`: of the steps, as the job itself reports it. `cut`: what tells one plan from another: per rank its
    node, samples and layers, and the micro-batches."""

    predicted_s: float
    measured_s: float
    median_s: float
    memory: tuple[Memory, ...]
    cut: tuple[tuple[Any, ...], ...]

    @property
    def error(self) -> float:
        return relative_error(self.predicted_s, self.measured_s)


def run_of(report: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Run:
    """`records`: the lines of metrics.jsonl. Raises ValueError for a job of which no step was timed."""
    plan, nodes = report["plan"], report["nodes"]
    last = max(attempt["fence"] for node in nodes.values() for attempt in node["attempts"])
    attempts = [
        (name, attempt) for name, node in nodes.items() for attempt in node["attempts"] if attempt["fence"] == last
    ]
    predicted_s, median_s = float(plan["estimate"]["step_s"]), float(report["measured"]["step_s"])
    try:
        return Run(predicted_s, steady_step_s(records), median_s, _memory(plan, attempts), cut_of(plan))
    except ValueError as error:
        raise ValueError(f"job {report['job']['id']}: {error}") from None


def steady_step_s(records: Sequence[Mapping[str, Any]]) -> float:
    """Mean of all steps but the first. Raises ValueError with fewer than two."""
    trained = [record for record in records if record["stage"] == "train"]
    if len(trained) < 2:
        raise ValueError("there are no two steps to time")
    first, last = trained[0], trained[-1]
    return float(last["time"] - first["time"]) / int(last["step"] - first["step"])


def cut_of(plan: Mapping[str, Any]) -> tuple[tuple[Any, ...], ...]:
    return tuple(
        (each["node_id"], tuple(each["data_range"]), tuple(each["layer_range"]), each["accumulate"])
        for each in sorted(plan["subtasks"], key=lambda each: int(each["rank"]))
    )


def _memory(plan: Mapping[str, Any], attempts: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[Memory, ...]:
    node_ids = {each["rank"]: each["node_id"] for each in plan["subtasks"]}
    used: dict[str, list[int]] = {}
    ids: dict[str, str] = {}
    for name, attempt in attempts:
        used.setdefault(name, []).append(attempt["peak_memory_bytes"] - attempt["baseline_memory_bytes"])
        ids[name] = node_ids[attempt["rank"]]
    predicted = plan["estimate"]["memory_bytes"]
    return tuple(
        Memory(name, int(predicted[ids[name]]) - len(measured) * RESERVE_BYTES, sum(measured))
        for name, measured in sorted(used.items())
    )


def relative_error(predicted: float, measured: float) -> float:
    """|predicted - measured| / measured. Raises ValueError without a measurement."""
    if measured <= 0:
        raise ValueError(f"nothing was measured: {measured}")
    return abs(predicted - measured) / measured


def mape(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean absolute percentage error of (predicted, measured), in percent. Raises ValueError without pairs."""
    if not pairs:
        raise ValueError("no pairs to compare")
    return 100 * fmean(relative_error(predicted, measured) for predicted, measured in pairs)
