"""An example of learning that changes a decision: `python -m bench.sim_example`.

Looks through the simulated worlds of bench/sim_planner.py for the first one in which a model that never ran is planned
otherwise after other jobs than before them, and prints both decisions as the planner words them, what finished jobs
taught in between, and how long both plans really take there.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path

if not __package__:  # run as a script: what is imported lies beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.sim_play import Coordinator, Way, job_s, play
from bench.sim_truth import Truth
from bench.sim_world import Job, World, fastest_flops, job, world
from coordinator import planner
from coordinator.earlier_groups import as_placed
from protos.ids import PlanId
from protos.plan import Plan
from qtable.policy import Ledger

SIGMA = 0.25
OTHERS = 12
LEAST_GAIN = 0.1


@dataclass(frozen=True, slots=True)
class Example:
    world: World
    job: Job
    before: Plan
    after: Plan
    before_s: float
    after_s: float
    known: Coordinator


def example() -> Example:
    """The first one in which another strategy is taken, and rightly."""
    for number in count():
        found = world(f"hive-example/{number}", least=3, most=3)
        rng = random.Random(number)
        one, *others = (job(rng, fastest_flops(found)) for _ in range(OTHERS + 1))
        truth, known = Truth(found, SIGMA), Coordinator()
        before = _planned(known, found, one)
        for other in others:
            play(truth, other, Way.RESIDUAL, known, rng)
        after = _planned(known, found, one)
        before_s, after_s = (job_s(truth, one, made.strategy, as_placed(made)) for made in (before, after))
        if before.strategy != after.strategy and after_s * (1 + LEAST_GAIN) < before_s:
            return Example(found, one, before, after, before_s, after_s, known)
    raise AssertionError("there is always another world")


def _planned(known: Coordinator, found: World, one: Job) -> Plan:
    table = known.learner.table
    return planner.plan(
        one.spec, one.profile, one.data, known.cluster(found), table, random.Random(0), Ledger(), plan_id=PlanId("p")
    )


def told(found: Example) -> str:
    lines = [
        f"before: {found.before.reason}",
        f"really: {found.before_s:.0f} s",
        "",
        f"{OTHERS} jobs of other models taught:",
    ]
    for node in found.world.cluster.nodes:
        learned = found.known.learner.speeds.of_node(node.node_id)
        said = ", ".join(f"{key} x {each['factor']:.2f} ({each['jobs']} jobs)" for key, each in learned.items())
        lines.append(f"  {node.name}: {said or 'nothing'}")
    kept = {c.strategy: (c.residual, c.visits) for c in found.after.candidates if c.feasible}
    said = ", ".join(f"{name} {residual:+.2f} (n {visits})" for name, (residual, visits) in kept.items())
    lines += [f"  residuals of the cell: {said}", "", f"after: {found.after.reason}", f"really: {found.after_s:.0f} s"]
    return "\n".join(lines)


def main() -> int:
    print(told(example()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
