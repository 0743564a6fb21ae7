"""How long a decision for eight nodes takes, by what the coordinator has learned: what many jobs taught, and as many
keys of each kind as it keeps.

Every decision that is timed follows a job that taught something, so what planners read of it is made anew: the worst
that a coordinator meets. CPU time. Owns no formula.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from bench.paired import percentile
from bench.report import Bound, Figure, Gate
from bench.sim_play import Coordinator, Way, play
from bench.sim_truth import Truth
from bench.sim_world import FAMILIES, Job, jobs, world
from coordinator.speeds import MOST_KEYS, Speeds
from protos.plan import Work
from strategies.cost import COST_MODEL_VERSION

NODES = 8
SIGMA = 0.25
TIMED = 25
BEFORE_FULL = 25  # jobs after the table was filled: their keys are the newest in it
LIMIT_MS, STAGES_LIMIT_MS = 50.0, 2000.0
NOTHING, FULL = "nothing learned", f"{MOST_KEYS:,} keys of each kind"


@dataclass(frozen=True, slots=True)
class Decision:
    seconds: float
    nodes: int
    stages: bool  # were looked for
    knowing: str


def taught_by(count: int) -> str:
    return f"what {count} jobs taught"


def decisions(number: int, count: int, seed: str, timed: int = TIMED) -> list[Decision]:
    """In one world: after `count` jobs, and with a table that was full before the last few."""
    found = world(f"{seed}/deciding/{number}", least=NODES, most=NODES)
    truth, order = Truth(found, SIGMA), jobs(found, count + timed)
    taught, full = Coordinator(), Coordinator()
    fill(full.learner.speeds)
    answers = []
    for known, before, knowing in ((taught, count, taught_by(count)), (full, min(count, BEFORE_FULL), FULL)):
        first = order[count - before : count]
        answers += list(_timed(truth, known, first, order[count:], knowing))
    return answers


def _timed(
    truth: Truth, known: Coordinator, before: Sequence[Job], timed: Sequence[Job], knowing: str
) -> Iterator[Decision]:
    rng = random.Random(knowing)
    for one in before:
        play(truth, one, Way.RESIDUAL, known, rng)
    for one in timed:
        seconds = play(truth, one, Way.PROBES, known, rng).decision_s
        yield Decision(seconds, len(truth.world.hidden), not one.profile.why_not_cut, knowing)


def fill(speeds: Speeds) -> None:
    """Machines that came and went, each of which ran models of every family in every way, on networks of their own."""
    kinds = [(family, work, part) for family, work, part in product(FAMILIES, Work, (0.1, 0.9))]
    for number in range(MOST_KEYS):
        family, work, overhead_s = kinds[number % len(kinds)]
        rank = {
            "node": f"gone{number // len(kinds)}", "family": family, "predicted_s": 1.0, "overhead_s": overhead_s,
            "measured_s": 1.1, "work_factor": 1.0, "overhead_factor": 1.0,
        }  # fmt: skip
        speeds.apply({
            "counted": True, "cost_model_version": COST_MODEL_VERSION, "measured_step_s": 1.1, "ranks": [rank],
            "basis": {"work": work.value, "model": f"model{number}", "combination": f"combination{number}"},
            "network": {"name": f"network{number}", "predicted_s": 1.0, "measured_s": 1.1, "factor": 1.0},
        })  # fmt: skip


def figures_of_decisions(decided: Sequence[Decision]) -> list[Figure]:
    found = []
    for knowing in dict.fromkeys(each.knowing for each in decided):
        for stages, limit_ms in ((False, LIMIT_MS), (True, STAGES_LIMIT_MS)):
            here = [each for each in decided if (each.nodes, each.stages, each.knowing) == (NODES, stages, knowing)]
            times = [1e3 * each.seconds for each in here]
            if not times:
                continue
            name = f"a decision, {NODES} nodes, {'with' if stages else 'without'} search for stages, {knowing}"
            low, high, gate = percentile(times, 0.5), max(times), Gate(Bound.BELOW, limit_ms)
            note = f"p99 of {len(times)}; median .. most"
            found.append(Figure(name, percentile(times, 0.99), "ms", low, high, gate, note))
    return found
