"""How well a step's time and a worker's memory are predicted: every model, strategy and kind of node, run three times.

Before anything runs, every combination is planned: that prediction is judged by the first run. Then all are run, run
again, and run once more; a job's own plan is the prediction of its run, so the second one has whatever the coordinator
learned from the first. The third run over the second, when both were cut alike, says what no prediction can be better
than: how well a run repeats itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.cluster import run_timed, running
from bench.report import Bound, Figure, Finding, Gate
from bench.stage import Stage
from bench.strategy_jobs import GPT_MEDIUM, MLP, MODELS, SHARDED, TENSOR, name_of, steps_for
from bench.strategy_report import Run, mape
from bench.workloads import Strategy, Workload, Written, write
from tests.e2e.cluster import Cluster

CPUS = {"one": 1.0, "half": 0.5, "twin": 0.5, "third": 0.5, "quarter": 0.25}  # at most 1.75 cores at once
RUN_S = 3.0
PASSES = 3
FIRST_MAPE, LEARNED_MAPE, MEMORY_MAPE = 20.0, 12.0, 15.0
REPEATS = 1.5  # of a repeated run's own MAPE: that much is allowed where it is more than LEARNED_MAPE
LARGE_BYTES = 64 * 1024**2  # below, what an allocator keeps is more than what a model needs


@dataclass(frozen=True, slots=True)
class Combination:
    workload: Workload
    strategy: Strategy
    nodes: tuple[str, ...]

    @property
    def name(self) -> str:
        caps = " + ".join(f"{CPUS[node]:g}" for node in self.nodes)
        return f"{self.workload.name}, {name_of(self.strategy)}, {caps} cores"


@dataclass(slots=True)
class Tried:
    """`planned_s`: predicted before any job ran. `why_not`: it was refused, and is no combination."""

    combination: Combination
    planned_s: float = 0.0
    why_not: str = ""
    runs: list[Run] = field(default_factory=list)


def combinations(models: Sequence[Workload] = MODELS) -> tuple[Combination, ...]:
    """One, two and three nodes, of equal and of unequal caps."""
    kinds: tuple[tuple[Strategy, tuple[str, ...]], ...] = (
        ("single_node", ("one",)),
        ("data_parallel", ("half", "twin")),
        ("data_parallel", ("one", "half", "quarter")),
        ("pipeline_parallel", ("one", "quarter")),
        ("pipeline_parallel", ("half", "twin", "third")),
        (SHARDED, ("half", "twin")),
        (TENSOR, ("half", "twin")),
    )
    return tuple(Combination(model, strategy, nodes) for model in models for strategy, nodes in kinds)


def predict(stage: Stage) -> Finding:
    wanted = combinations((MLP, GPT_MEDIUM) if stage.quick else MODELS)
    tried = [Tried(each) for each in (wanted[::2] if stage.quick else wanted)]
    with running(stage.subfolder("predict"), tuple(CPUS), stage.threads, CPUS) as cluster:
        files = [_file(stage, number, each.combination) for number, each in enumerate(tried)]
        for each, written in zip(tried, files, strict=True):
            _plan(cluster, each, written)
        for number in range(stage.either(PASSES, 2)):
            for each, written in zip(tried, files, strict=True):
                if not each.why_not:
                    _run(stage, cluster, each, written, number)
    return Finding("predict", figures([each for each in tried if each.runs]), _detail(tried))


def _file(stage: Stage, number: int, combination: Combination) -> Written:
    root = stage.subfolder("jobs")
    return write(combination.workload, combination.strategy, combination.nodes, root, f"c{number}")


def _plan(cluster: Cluster, tried: Tried, written: Written) -> None:
    done = cluster.hive("plan", str(written.job), "-o", "json", check=False)
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        tried.why_not = str(answer["error"]["message"])
    else:
        tried.planned_s = float(answer["plan"]["estimate"]["step_s"])


def _run(stage: Stage, cluster: Cluster, tried: Tried, written: Written, number: int) -> None:
    steps = steps_for(stage.either(30, 10) / 30 * RUN_S, tried.planned_s)
    run = run_timed(cluster, written, f"train.steps={steps}")
    tried.runs.append(run)
    stage.tell(
        f"run {number + 1}, {tried.combination.name}, {steps} steps: "
        f"predicted {1e3 * run.predicted_s:.1f}, measured {1e3 * run.measured_s:.1f} ms, {100 * run.error:.0f} % off"
    )


def figures(tried: Sequence[Tried]) -> tuple[Figure, ...]:
    """Of everything that ran twice at least. Raises ValueError without any."""
    repeated = [each for each in tried if len(each.runs) > 2 and each.runs[1].cut == each.runs[2].cut]
    first = mape([(each.planned_s, each.runs[0].measured_s) for each in tried])
    learned = mape([(each.runs[1].predicted_s, each.runs[1].measured_s) for each in tried])
    limit, repeat = LEARNED_MAPE, None
    if repeated:
        repeat = mape([(each.runs[1].measured_s, each.runs[2].measured_s) for each in repeated])
        limit = max(limit, REPEATS * repeat)
    found = [
        Figure("combinations", len(tried), gate=Gate(Bound.AT_LEAST, 20)),
        Figure("step time, planned before any job ran", first, "% MAPE", gate=Gate(Bound.BELOW, FIRST_MAPE)),
        Figure(
            "step time, first run of each",
            mape([(each.runs[0].predicted_s, each.runs[0].measured_s) for each in tried]),
            "% MAPE",
            note="other combinations have run before",
        ),
        Figure(
            "step time, first run of each, beside the median step",
            mape([(each.runs[0].predicted_s, each.runs[0].median_s) for each in tried]),
            "% MAPE",
        ),
        Figure("step time, after one run of each", learned, "% MAPE", gate=Gate(Bound.BELOW, limit)),
    ]
    if repeat is not None:
        found.append(Figure("step time, a run beside its repetition", repeat, "% MAPE", note=f"of {len(repeated)}"))
    return (*found, *_memory_figures(tried))


def _memory_figures(tried: Sequence[Tried]) -> list[Figure]:
    of_all = [memory for each in tried for memory in each.runs[0].memory if memory.measured_bytes > 0]
    large = [memory for memory in of_all if memory.predicted_bytes >= LARGE_BYTES]
    found = []
    for name, chosen, gate in (
        ("memory above the baseline, 64 MiB and more", large, Gate(Bound.BELOW, MEMORY_MAPE)),
        ("memory above the baseline, all", of_all, None),
    ):
        if chosen:
            value = mape([(memory.predicted_bytes, memory.measured_bytes) for memory in chosen])
            worst = 100 * max(memory.error for memory in chosen)
            found.append(Figure(name, value, "% MAPE", gate=gate, note=f"{len(chosen)} nodes, worst {worst:.0f} %"))
    return found


def _detail(tried: Sequence[Tried]) -> dict[str, Any]:
    return {
        "runs": [
            {
                "name": each.combination.name,
                "planned_s": each.planned_s,
                "why_not": each.why_not,
                "runs": [asdict(run) for run in each.runs],
            }
            for each in tried
        ]
    }
