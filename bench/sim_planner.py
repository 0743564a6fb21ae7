"""How good the choice is, in simulated worlds: `python -m bench.sim_planner [--quick] [--worlds N] [--json FILE]`.

The planner is the real one, the truth is not its formulas (bench/sim_truth.py), the oracle runs every plan. Regret is
the time of a job over that of the oracle's plan, less one; trials, changes and slower steps are part of the time.
Progress goes to stderr, the table to stdout; exit code 1 when a gate fails, a --quick run judges nothing.
docs/benchmarks.md says how to read it, `--markdown` prints the rows that stand there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeVar

if not __package__:  # run as a script: what is imported lies beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.paired import percentile
from bench.report import Bound, Figure, Finding, Gate, document, markdown, table
from bench.sim_decisions import NOTHING, Decision, decisions, figures_of_decisions
from bench.sim_play import Coordinator, Plans, Played, Way, every_plan, job_s, oracle_s, play, predicted_best_s
from bench.sim_tables import Case, fixed, literal
from bench.sim_truth import Truth
from bench.sim_world import Job, World, fastest_flops, job, jobs, world
from qtable.policy import EPSILON, LEDGER_SHARE

SIGMAS = (0.1, 0.25, 0.5)
SEED = "hive-1"
CLUSTERS, LEARNING_WORLDS = 5000, 100
JOBS, JUDGED = 200, 25  # of a learning world, and how many of the last ones are held against the oracle
LEARNING_NODES = 5  # at most
LONGEST_MIN = 30.0
DECIDING_WORLDS = 4  # in which decisions are timed
QUICK_CLUSTERS, QUICK_WORLDS, QUICK_JOBS = 60, 4, 40


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """One job in one world at one scale of errors. `regrets` by way of choosing; with probes `looking_s` of `seconds`
    went into finding the plan that it ended with."""

    sigma: float
    case: Case
    regrets: dict[str, float]
    model: float  # regret of the cost model alone
    alone: float  # regret of the single node that is predicted best; inf where there is none
    tried: bool
    again: bool
    short_of_memory: int
    seconds: float
    looking_s: float


@dataclass(frozen=True, slots=True)
class Learned:
    """A world after its jobs: those that were judged, and of all jobs what exploring was predicted to have cost."""

    runs: tuple[Run, ...]
    ledger_share: float
    short_of_memory: int


def day_one(number: int) -> tuple[list[Run], list[Decision]]:
    found = world(f"{SEED}/day/{number}")
    one = job(random.Random(f"{SEED}/day/{number}/job"), fastest_flops(found))
    plans, runs, decided = every_plan(found, one), [], []
    for sigma in SIGMAS:
        truth = Truth(found, sigma)
        played = {Way.PROBES: play(truth, one, Way.PROBES, Coordinator(), random.Random(f"{SEED}/{number}/{sigma}"))}
        took_s = played[Way.PROBES].decision_s
        decided.append(Decision(took_s, len(found.hidden), not one.profile.why_not_cut, NOTHING))
        runs.append(_run(truth, one, played, plans, again=False))
    return runs, decided


def after_jobs(number: int, count: int) -> list[Learned]:
    """A world at every scale."""
    found = world(f"{SEED}/learning/{number}", most=LEARNING_NODES)
    order = jobs(found, count)
    plans = {id(one): every_plan(found, one) for one in order[-JUDGED:]}
    answers = []
    for sigma in SIGMAS:
        truth = Truth(found, sigma)
        known = {way: Coordinator() for way in (Way.RESIDUAL, Way.PROBES)}
        rngs = {way: random.Random(f"{SEED}/{number}/{sigma}") for way in known}
        runs, short = [], 0
        for index, one in enumerate(order):
            played = {way: play(truth, one, way, known[way], rngs[way]) for way in known}
            short += sum(_short_of_memory(found, each) for each in played.values())
            if index >= count - JUDGED:
                again = any(one is earlier for earlier in order[:index])
                runs.append(_run(truth, one, played, plans[id(one)], again))
        ledgers = [each.learner.ledger for each in known.values()]
        share = max(ledger.loss_s / ledger.job_s for ledger in ledgers)
        answers.append(Learned(tuple(runs), share, short))
    return answers


def _run(truth: Truth, one: Job, played: dict[Way, Played], plans: Plans, again: bool) -> Run:
    best_s = min(oracle_s(truth, one, plans), min(each.seconds for each in played.values()))
    actions = {strategy: job_s(truth, one, strategy, placed) for strategy, placed in plans.best.items()}
    case = Case(plans.key, actions, best_s)
    return Run(
        truth.sigma,
        case,
        {way.value: each.seconds / best_s - 1.0 for way, each in played.items()},
        predicted_best_s(truth, one, plans) / best_s - 1.0,
        case.regret("single_node") if "single_node" in actions else float("inf"),
        bool(played[Way.PROBES].trials),
        again,
        sum(_short_of_memory(truth.world, each) for each in played.values()),
        played[Way.PROBES].seconds,
        played[Way.PROBES].looking_s,
    )


def _short_of_memory(found: World, played: Played) -> int:
    granted = {node.node_id: node.capacity.memory_bytes for node in found.cluster.nodes}
    return sum(need > granted[node] for group in played.groups for node, need in group.memory_bytes.items())


def figures_of_day_one(runs: Sequence[Run]) -> list[Figure]:
    found = []
    for sigma in SIGMAS:
        here = [run for run in runs if run.sigma == sigma]
        cases, name = [run.case for run in here], f"day one, sigma {sigma:g}"
        gated = sigma == SIGMAS[1]
        longest = Gate(Bound.BELOW, 40.0) if gated else None
        found += [
            _regret(f"{name}: literal zero table", literal(cases, 1)),
            _regret(f"{name}: best fixed action of each cell", fixed(cases)),
            _regret(f"{name}: always the best single node", [run.alone for run in here if run.alone < float("inf")]),
            _regret(f"{name}: epsilon-greedy over all feasible actions", [_drawn(run) for run in here]),
            _regret(f"{name}: cost model only", [run.model for run in here], Gate(Bound.BELOW, 9.0) if gated else None),
            _tail(f"{name}: cost model only, p95", [run.model for run in here], longest),
            _regret(f"{name}: with probes", _of(here, Way.PROBES), Gate(Bound.BELOW, 2.0) if gated else None),
            _regret(f"{name}: with probes, among the strategies' best plans", _among_actions(here, Way.PROBES)),
            _tail(f"{name}: with probes, p95", _of(here, Way.PROBES), longest),
        ]
    sigma = SIGMAS[1]
    short = sum(run.short_of_memory for run in runs)
    tried = fmean(run.tried for run in runs if run.sigma == sigma)
    wins = [min(run.case.actions, key=lambda action: run.case.actions[action]) for run in runs if run.sigma == sigma]
    shares = ", ".join(f"{name} {wins.count(name) / len(wins):.0%}" for name in sorted(set(wins)))
    found.append(Figure("day one: jobs that begin with trials", 100 * tried, "%", note=f"winners: {shares}"))
    found.append(_looking(f"day one, sigma {sigma:g}", [run for run in runs if run.sigma == sigma]))
    found.append(Figure("day one: out of memory", short, gate=Gate(Bound.EXACTLY, 0)))
    return found


def figures_after_jobs(worlds: Sequence[Learned], count: int) -> list[Figure]:
    found = []
    gates = {
        (0.1, Way.RESIDUAL): 2.5, (0.25, Way.RESIDUAL): 2.5, (0.1, Way.PROBES): 1.5, (0.25, Way.PROBES): 1.5,
        (0.5, Way.PROBES): 4.0,
    }  # fmt: skip
    for sigma in SIGMAS:
        here = [run for each in worlds for run in each.runs if run.sigma == sigma]
        name = f"after {count} jobs, sigma {sigma:g}"
        model = _regret(f"{name}: without learning", [run.model for run in here])
        if sigma == SIGMAS[1]:
            model = _regret(
                f"{name}: without learning (has to fail)", [run.model for run in here], Gate(Bound.AT_LEAST, 2.5)
            )
        found.append(model)
        for way in (Way.RESIDUAL, Way.PROBES):
            limit = gates.get((sigma, way))
            gate = None if limit is None else Gate(Bound.BELOW, limit)
            found.append(_regret(f"{name}: {way.value}", _of(here, way), gate))
        gate = Gate(Bound.BELOW, 100 * LEDGER_SHARE) if sigma == SIGMAS[1] else None
        found.append(_looking(name, here, gate))
        new = [run for run in here if not run.again]
        found.append(_regret(f"{name}: with probes, models never run before", _of(new, Way.PROBES)))
    share, bound = max(each.ledger_share for each in worlds), Gate(Bound.BELOW, 100 * LEDGER_SHARE + 1e-9)
    ledger = Figure(f"after {count} jobs: ledger, the worst world", 100 * share, "%", gate=bound)
    lost = sum(each.short_of_memory for each in worlds)
    short = Figure(f"after {count} jobs: out of memory", lost, gate=Gate(Bound.EXACTLY, 0))
    return [*found, ledger, short]


def _looking(name: str, runs: Sequence[Run], gate: Gate | None = None) -> Figure:
    """What trials and changes of plan cost of all that jobs took, whoever pays for it."""
    share = sum(run.looking_s for run in runs) / sum(run.seconds for run in runs)
    return Figure(f"{name}: trials and changes of plan, of all time", 100 * share, "%", gate=gate)


def _of(runs: Iterable[Run], way: Way) -> list[float]:
    return [run.regrets[way.value] for run in runs]


def _drawn(run: Run) -> float:
    """Expected, of the cost model's choice with any feasible action in its place now and then."""
    return (1 - EPSILON) * run.model + EPSILON * fmean(run.case.regret(action) for action in run.case.actions)


def _among_actions(runs: Iterable[Run], way: Way) -> list[float]:
    """Against the best of the five plans that were weighed: what choosing between them could have won."""
    return [(1 + run.regrets[way.value]) * run.case.oracle_s / min(run.case.actions.values()) - 1 for run in runs]


def _regret(name: str, regrets: Sequence[float], gate: Gate | None = None) -> Figure:
    percent = [100 * each for each in regrets]
    if not percent:
        return Figure(name, 0.0, "%", note="no such run")
    return Figure(
        name, fmean(percent), "%", percentile(percent, 0.5), percentile(percent, 0.95), gate, "mean; p50 .. p95"
    )


def _tail(name: str, regrets: Sequence[float], gate: Gate | None) -> Figure:
    return Figure(name, 100 * percentile(list(regrets), 0.95), "%", gate=gate)


def simulate(clusters: int, worlds: int, count: int) -> list[Finding]:
    with ProcessPoolExecutor(max(1, min(2, len(os.sched_getaffinity(0))))) as pool:
        started = time.perf_counter()
        days = list(_shown(pool.map(day_one, range(clusters), chunksize=5), clusters, "clusters"))
        runs = [run for found, _ in days for run in found]
        first = figures_of_day_one(runs)
        middle = time.perf_counter()
        order = _shown(pool.map(after_jobs, range(worlds), [count] * worlds), worlds, "worlds")
        second = figures_after_jobs([learned for each in order for learned in each], count)
        deciding = time.perf_counter()
        numbers = range(min(worlds, DECIDING_WORLDS))
        decided = [decision for _, found in days for decision in found]
        timed = _shown(
            pool.map(decisions, numbers, [count] * len(numbers), [SEED] * len(numbers)),
            len(numbers),
            "worlds of decisions",
        )
        third = figures_of_decisions([*decided, *(decision for found in timed for decision in found)])
        ended = time.perf_counter()
    return [
        Finding("day one", tuple(first), seconds=middle - started),
        Finding("learned", tuple(second), seconds=deciding - middle),
        Finding("decisions", tuple(third), seconds=ended - deciding),
        Finding("all", (Figure("whole run", (ended - started) / 60, "min", gate=Gate(Bound.BELOW, LONGEST_MIN)),)),
    ]


def _shown(found: Iterable[T], count: int, what: str) -> Iterable[T]:
    started = time.perf_counter()
    for number, each in enumerate(found, start=1):
        if number % max(1, count // 20) == 0:
            sys.stderr.write(f"{number} of {count} {what}, {time.perf_counter() - started:.0f} s\n")
        yield each


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute; nothing is judged")
    parser.add_argument("--clusters", type=int, default=CLUSTERS)
    parser.add_argument("--worlds", type=int, default=LEARNING_WORLDS)
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--markdown", action="store_true", help="the table as docs/benchmarks.md has it")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    sizes = (QUICK_CLUSTERS, QUICK_WORLDS, QUICK_JOBS) if asked.quick else (asked.clusters, asked.worlds, asked.jobs)
    findings = simulate(*sizes)
    print(markdown(findings) if asked.markdown else table(findings))
    print(f"{sum(finding.seconds for finding in findings):.0f} s")
    if asked.json:
        options = {"clusters": sizes[0], "worlds": sizes[1], "jobs": sizes[2], "seed": SEED}
        asked.json.write_text(json.dumps(document(findings, options), indent=1) + "\n", encoding="utf-8")
    return 0 if asked.quick or all(finding.passed for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
