"""A simulated job from its submission to its end under a way of choosing, and the oracle that runs every plan.

The planner, the review of a running job, the events, the table and the speeds are those of the coordinator; only the
measured times come from bench/sim_truth.py. Owns no formula of either side.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from bench.sim_truth import Step, Truth, noise
from bench.sim_world import Job, World
from coordinator import planner
from coordinator.earlier_groups import as_placed
from coordinator.learning import DECISION, OUTCOME, TRIAL, Learner, Measured, decision_payload, outcome_payload
from coordinator.review import Standing, review, steps_needed
from coordinator.reviewing import WARM_STEPS
from protos.ids import Fence, NodeId, PlanId
from protos.jobspec import StrategyName
from protos.plan import ClusterView, Plan
from protos.work import StepTimes, Usage
from qtable.policy import choose
from qtable.prior import Prior, load_prior
from qtable.state import StateKey
from strategies.base import Inputs, PlacedEstimate
from strategies.cost import COST_MODEL_VERSION
from strategies.registry import BUILT

NO_FILE = Path(tempfile.gettempdir()) / "hive-simulated-qtable.json"
PRIOR = Prior(load_prior().q0, COST_MODEL_VERSION)  # its values play no part in a choice, its version must fit


class Way(StrEnum):
    """Of choosing, with what was learned."""

    RESIDUAL = "with learning, without probes"
    PROBES = "with probes"


@dataclass(frozen=True, slots=True)
class Group:
    """One plan of a job while it ran."""

    strategy: str
    step_s: float
    memory_bytes: Mapping[NodeId, float]


@dataclass(frozen=True, slots=True)
class Played:
    """`seconds` is what is to be expected of such a course: luck decides what is learned, not who was right.
    `looking_s` of them went into changes of plan, and into steps slower than those of the plan it ended with."""

    seconds: float
    looking_s: float
    groups: tuple[Group, ...]
    trials: tuple[str, ...]
    explored: bool
    decision_s: float


@dataclass(slots=True)
class Coordinator:
    """What one coordinator has learned. Its events are numbered as a log would; there is no file."""

    learner: Learner = field(default_factory=lambda: Learner(NO_FILE, PRIOR))
    seq: int = 0

    def cluster(self, world: World) -> ClusterView:
        return replace(world.cluster, learned=self.learner.speeds.learned())

    def apply(self, kind: str, payload: Mapping[str, Any]) -> None:
        self.seq += 1
        self.learner.apply(self.seq, kind, payload)
        if kind in (OUTCOME, TRIAL):
            self.learner.speeds.apply(payload)


def play(truth: Truth, job: Job, way: Way, known: Coordinator, rng: random.Random) -> Played:
    """With trials and reviews only where the way has probes."""
    world, steps = truth.world, job.spec.train.steps or 1
    started = time.process_time()
    plan = _chosen(known, world, job, way, rng)
    decision_s = time.process_time() - started
    known.apply(DECISION, decision_payload(plan, job.spec, job.profile, job.data))
    first, fence, done, total_s = plan, 1, 0, truth.startup_s(job, plan.strategy, _nodes(plan))
    groups, earlier, switching_s, made = list[Group](), list[Plan](), 0.0, list[int]()
    while True:
        step, luck = truth.step(job, plan.strategy, as_placed(plan)), noise(rng)
        groups.append(Group(plan.strategy, step.seconds, step.memory_bytes))
        need = steps_needed(plan) + WARM_STEPS
        if way is Way.PROBES and steps - done > need:
            total_s, done = total_s + need * step.seconds, done + need
            times = {rank: _times(usage) for rank, usage in _measured(step, luck, need, fence).usages}
            step_s = luck * step.seconds
            standing = Standing(plan, Fence(fence), done, need, step_s, times=times, earlier=tuple(earlier))
            table, cluster = known.learner.table, known.cluster(world)
            verdict = review(standing, job.spec, job.profile, job.data, cluster, table)
            if verdict.plan is not None:
                earlier.append(plan)
                known.apply(TRIAL, outcome_payload(plan, _measured(step, luck, need, fence)))
                switching_s += truth.switch_s(job, [*_nodes(plan), *_nodes(verdict.plan)])
                made.append(need)
                plan, fence = verdict.plan, fence + 1
                continue
        total_s += (steps - done) * step.seconds
        known.apply(OUTCOME, outcome_payload(plan, _measured(step, luck, steps - done, fence)))
        slower_s = sum(
            steps_made * max(0.0, group.step_s - step.seconds)
            for steps_made, group in zip(made, groups[:-1], strict=True)
        )
        return Played(
            total_s + switching_s,
            switching_s + slower_s,
            tuple(groups),
            first.trials,
            first.explored_loss_s > 0,
            decision_s,
        )


def _chosen(known: Coordinator, world: World, job: Job, way: Way, rng: random.Random) -> Plan:
    cluster, learner = known.cluster(world), known.learner
    if way is Way.PROBES:
        return planner.plan(
            job.spec, job.profile, job.data, cluster, learner.table, rng, learner.ledger, plan_id=PlanId("simulated")
        )
    considered = planner.consider(Inputs(job.spec, job.profile, job.data, cluster), learner.table)
    choice = choose(considered.arms, considered.residuals, rng, learner.ledger, switch_s=0.0, probes=False)
    made = planner.plan_of(considered, choice.action, choice.reason, choice.propensity, PlanId("simulated"))
    return replace(made, explored_loss_s=choice.charge_s)


def _nodes(plan: Plan) -> tuple[NodeId, ...]:
    return tuple(dict.fromkeys(part.node_id for part in plan.subtasks))


def _times(usage: Usage) -> StepTimes:
    return StepTimes(usage.step_compute_s, usage.step_sync_s, usage.step_cpu_s, usage.step_carrying_s)


def _measured(step: Step, luck: float, steps: int, fence: int) -> Measured:
    """What the ranks of a group report."""
    usages = []
    for rank, seconds in enumerate(step.ranks):
        own_s = luck * min(seconds, step.seconds)
        waited_s = luck * step.seconds - own_s
        usages.append((rank, Usage(0, steps, 0.0, 0.0, 0.0, 0, 0, step_compute_s=own_s, step_sync_s=waited_s)))
    return Measured(True, fence, steps, luck * step.seconds, 0.0, usages=tuple(usages))


@dataclass(frozen=True, slots=True)
class Plans:
    """`best`: the plan of each strategy as predicted. `others`: what else could be done."""

    key: StateKey
    best: dict[str, PlacedEstimate]
    others: list[tuple[str, PlacedEstimate]]


def every_plan(world: World, job: Job) -> Plans:
    """The best plan of each strategy as predicted; the single node on every node; data-parallel and shards on so many
    nodes, data-parallel without any one of the best; pipelines over the two and three fastest."""
    inputs = Inputs(job.spec, job.profile, job.data, world.cluster)
    considered = planner.consider(inputs, load_prior().table())
    return Plans(considered.key, considered.placed, list(_others(inputs, considered.placed)))


def _others(inputs: Inputs, best: Mapping[str, PlacedEstimate]) -> Iterator[tuple[str, PlacedEstimate]]:
    names = [node.name for node in inputs.cluster.nodes]
    alone = {name: dict(_plans(_only(inputs, [name]), [StrategyName.SINGLE_NODE])) for name in names}
    for found in alone.values():
        yield from found.items()
    for count in range(2, len(names) + 1):
        few = _with_nodes(inputs, min=count, max=count)
        yield from _plans(few, [StrategyName.DATA_PARALLEL, StrategyName.MODEL_PARALLEL])
    together = best.get(StrategyName.DATA_PARALLEL.value)
    for node in together.nodes if together is not None and len(together.nodes) > 2 else ():
        left = [name for name in names if name != node]
        yield from _plans(_only(inputs, left), [StrategyName.DATA_PARALLEL])
    fastest = sorted(
        names, key=lambda name: min((each.cost.seconds for each in alone[name].values()), default=math.inf)
    )
    for count in (2, 3):
        if count < len(names):
            yield from _plans(_only(inputs, fastest[:count]), [StrategyName.PIPELINE_PARALLEL])


def _plans(inputs: Inputs, strategies: Sequence[StrategyName]) -> Iterator[tuple[str, PlacedEstimate]]:
    for name in strategies:
        if not BUILT[name].feasible(inputs):
            yield name.value, BUILT[name].estimate(inputs)


def _only(inputs: Inputs, names: Sequence[str]) -> Inputs:
    require = inputs.spec.nodes.require.model_copy(update={"names": tuple(names)})
    return _with_nodes(inputs, require=require)


def _with_nodes(inputs: Inputs, **nodes: Any) -> Inputs:
    spec = inputs.spec.model_copy(update={"nodes": inputs.spec.nodes.model_copy(update=nodes)})
    return replace(inputs, spec=spec)


def oracle_s(truth: Truth, job: Job, plans: Plans) -> float:
    """The least time of any plan."""
    everything = [*plans.best.items(), *plans.others]
    return min(job_s(truth, job, strategy, placed) for strategy, placed in everything)


def predicted_best_s(truth: Truth, job: Job, plans: Plans) -> float:
    """Of the plan that the cost model alone takes."""
    strategy, placed = min(plans.best.items(), key=lambda best: best[1].cost.seconds)
    return job_s(truth, job, strategy, placed)


def job_s(truth: Truth, job: Job, strategy: str, placed: PlacedEstimate) -> float:
    steps = job.spec.train.steps or 1
    return truth.startup_s(job, strategy, placed.nodes) + steps * truth.step(job, strategy, placed).seconds
