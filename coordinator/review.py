"""Whether a running job goes on under another plan: pure.

Asked once a group has shown how long its steps take, and again when nodes, links or speeds have changed. The step that
was measured stands against what is predicted of all other plans over the nodes of the job and those that are idle.
Owns the trials of a job that began with some: one after the other, those left out that can no longer win, then the
quickest; and that some are worth it after what the first group has shown. A job does not swing to and fro: a change
must save more than twice what it costs, and be clearly quicker than what was measured, the more clearly where it is
only predicted (qtable/probing.py). A strategy that the job file names is kept, or gone back to; only its nodes and
cut may change.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from coordinator import planner
from coordinator.control.shape import Shape
from coordinator.earlier_groups import beside_itself, with_earlier
from coordinator.other_nodes import AS_IT_IS, plan_of_way, said, strategy_of, way_of, with_other_nodes
from coordinator.planner import Consideration
from coordinator.speeds import alone_s, computing_s
from protos.ids import Fence, NodeId
from protos.jobspec import JobSpec
from protos.model import ModelProfile
from protos.plan import ClusterView, DataProfile, Plan
from protos.work import StepTimes
from qtable.policy import BAND, Ledger, choose, masked
from qtable.probing import ABORT_STEPS, REPEAT_DEVIATION, Arm, Belief, abort, belief, worth_switching
from qtable.table import QTable
from strategies.base import Inputs
from strategies.cost import COST_MODEL_VERSION, assumed_steps
from strategies.learned import TRANSFER, with_running
from strategies.survival import efficiency

HOPELESS = 2.5  # what waits is only predicted, and may itself turn out half as slow again
MOST_CHANGES = 16  # of one job: whatever it was, looking for a better plan did not help
RECUT = 0.25  # that another cut of the same nodes is quicker by: what they compute varies by as much on busy machines
MOST_TRYING = 6  # changes, after which no new trials begin


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job is. `step_s`: a usual step of the group that runs, of which `steps_here` were made; `changes`: how
    often it took another plan; `unfit`: plans that could not begin; `times`: what the ranks of a group have said of
    their own steps; `earlier`: plans of groups that worked on it before."""

    plan: Plan
    fence: Fence
    step: int
    steps_here: int
    step_s: float
    changes: int = 0
    unfit: frozenset[Shape] = frozenset()
    times: Mapping[int, StepTimes] = field(default_factory=dict)
    earlier: tuple[Plan, ...] = ()

    @property
    def trying(self) -> bool:
        return len(self.plan.trials) > 0

    @property
    def tried(self) -> bool:
        """Whether the trial that runs has made its steps."""
        return self.steps_here >= self.plan.trial_steps

    @property
    def told(self) -> bool:
        """Whether every rank of a group has said what it computes and what it waits; in tensor parallel none can."""
        tensor = self.plan.layout is not None and self.plan.layout.tensor > 1
        return 1 < len(self.plan.estimate.ranks) == len(self.times) and not tensor

    @property
    def own(self) -> frozenset[NodeId]:
        return frozenset(subtask.node_id for subtask in self.plan.subtasks)


def steps_needed(plan: Plan) -> int:
    """Steps of a group, before they say all that they are made for."""
    return max(plan.trial_steps, ABORT_STEPS) if plan.trials else ABORT_STEPS


@dataclass(frozen=True, slots=True)
class Verdict:
    """`plan`: to change to; None: the one that runs stays, for good where trials are `over`."""

    message: str
    plan: Plan | None = None
    over: bool = False


def review(
    standing: Standing, spec: JobSpec, profile: ModelProfile, data: DataProfile, cluster: ClusterView, table: QTable
) -> Verdict:
    """`cluster`: the nodes of the job and those it could have beside them."""
    running = standing.plan
    left = (running.steps or assumed_steps(profile, spec.train, data)) - standing.step
    stays = Verdict(f"{running.strategy} stays", over=standing.trying)
    if left <= 0 or standing.changes >= MOST_CHANGES:
        return stays
    inputs = Inputs(spec, profile, data, cluster)
    if running.cost_model_version == COST_MODEL_VERSION:
        inputs = with_running(inputs, running.estimate, standing.step_s, computing_s(running, standing.times))
    weighed = planner.consider(planner.without_shape(inputs, running.strategy), table)
    switch_s = weighed.switch_s + standing.step_s  # and the step that is under way
    considered = with_earlier(with_other_nodes(weighed), standing.earlier, running)
    now = way_of(considered, running)
    arms = _arms(considered, standing, now, left)
    asked = spec.strategy not in ("auto", running.strategy) and _can_begin(considered, standing, spec.strategy)
    if asked and left * standing.step_s > switch_s:
        message = f"{spec.strategy}, as the job file asks, now that it can be"
        return Verdict(message, plan_of_way(considered, arms, spec.strategy, message))
    if spec.strategy == "auto":
        waiting, steps = _next_trials(considered, standing, arms, now, left), running.trial_steps
        if standing.trying and not standing.tried and not _hopeless(standing, arms, now, waiting):
            return Verdict(f"{running.strategy} is being tried")
        looking = not waiting and standing.changes < MOST_TRYING
        if looking and (not standing.trying or standing.tried):  # what is known now may make it worth to try others
            found = choose(arms, considered.residuals, random.Random(0), Ledger(), switch_s=switch_s, running=now)
            waiting, steps = found.trials if found.action != now else (), found.trial_steps
        if waiting and left * standing.step_s > 2 * switch_s:
            message = f"tries {said(considered, waiting[0])} for {steps} steps"
            return Verdict(message, plan_of_way(considered, arms, waiting[0], message, waiting, steps))
    other = _other_of_the_same(considered, standing, arms, left, switch_s)
    asked_for = {name: arm for name, arm in arms.items() if name == now or spec.strategy in ("auto", strategy_of(name))}
    far = masked(asked_for, now)
    for name in sorted(
        (name for name in asked_for if name not in far), key=lambda name: _expected_s(arms, considered, name)
    ):
        expected_s = _expected_s(arms, considered, name)
        if name == now or (other is not None and other.seconds <= expected_s):
            break
        worth = worth_switching(arms[now].seconds - expected_s, switch_s)
        if worth and _clearly(considered, standing, name, expected_s / left, arms[name].measured):
            against = _against(expected_s / left, standing.step_s)
            message = f"{said(considered, name)} instead of {_said_of(considered, standing, now)}: {against}"
            return Verdict(message, plan_of_way(_beside(considered, standing, name, now), arms, name, message))
    return other.verdict if other is not None else stays


def _said_of(considered: Consideration, standing: Standing, now: str) -> str:
    """Of several nodes with their names: what they gave way to may be another group of the same strategy."""
    names = [node.name for node in considered.inputs.cluster.nodes if node.node_id in standing.own]
    return said(considered, now) if len(names) < 2 else f"{now} on {', '.join(names)}"


def _beside(considered: Consideration, standing: Standing, way: str, now: str) -> Consideration:
    """With a row of the group that runs where another one of its strategy takes its row; nodes alone have their own."""
    if now != strategy_of(way) or len(standing.own) < 2:
        return considered
    return beside_itself(considered, standing.plan, standing.step_s)


def _next_trials(
    considered: Consideration, standing: Standing, arms: Mapping[str, Arm], now: str, left: int
) -> tuple[str, ...]:
    """Those that wait and could still be the quickest, from the first that can; none where too little is left."""
    if left <= 2 * standing.plan.trial_steps:
        return ()
    far = masked(arms, now)
    for index, action in enumerate(standing.plan.trials[1:], start=1):
        if action in arms and action not in far and _may_win(action, arms, considered.residuals, now):
            return tuple(name for name in standing.plan.trials[index:] if name in arms)
    return ()


def _hopeless(standing: Standing, arms: Mapping[str, Arm], now: str, waiting: tuple[str, ...]) -> bool:
    """A trial is ended early when its steps take more than HOPELESS times those of another that waits or was measured:
    it would only cost time to know by how much."""
    known = [*waiting, *(name for name, arm in arms.items() if arm.measured and name != now)]
    return any(standing.step_s > HOPELESS * arms[name].step_s for name in known)


def _expected_s(arms: Mapping[str, Arm], considered: Consideration, name: str) -> float:
    return belief(arms[name], considered.residuals[name]).median_s


def _clearly(considered: Consideration, standing: Standing, way: str, step_s: float, measured: bool) -> bool:
    """Whether steps of `step_s` are shorter by more than two runs of the same, or a prediction, can be off."""
    if not measured:
        return abort(standing.step_s, step_s)
    if strategy_of(way) == standing.plan.strategy and set(considered.placed[way].nodes) == standing.own:
        return step_s * (1 + RECUT) < standing.step_s
    return step_s * (1 + (REPEAT_DEVIATION if standing.trying else BAND)) < standing.step_s


def _arms(considered: Consideration, standing: Standing, now: str, left: int) -> dict[str, Arm]:
    """Of what is left of the job; that of the running strategy as it runs."""
    arms = {
        name: replace(arm, seconds=left * arm.step_s / considered.survival[name], steps=left)
        for name, arm in considered.arms.items()
        if _can_begin(considered, standing, name)
    }
    inputs, plan = considered.inputs, standing.plan
    nodes = [node for node in inputs.cluster.nodes if node.node_id in standing.own]
    survival = efficiency(nodes, plan.layout, inputs.spec.checkpoint.every_s)
    arms[now] = Arm(left * standing.step_s / survival, standing.step_s, left, REPEAT_DEVIATION, True)
    return arms


def _can_begin(considered: Consideration, standing: Standing, way: str) -> bool:
    """Whether there is a plan of it, and not one that this job tried in vain."""
    placed = considered.placed.get(way)
    shape = None if placed is None else Shape(strategy_of(way), frozenset(placed.nodes), placed.layout)
    return shape is not None and shape not in standing.unfit


def _may_win(action: str, arms: Mapping[str, Arm], residuals: Mapping[str, float], running: str) -> bool:
    """Whether a strategy that waits for its trial could still be the quickest, as far as its prediction can be off."""
    if action == running or arms[action].measured:
        return False
    hoped = belief(arms[action], residuals[action])
    known_s = min(arm.seconds for arm in arms.values() if arm.measured)
    return hoped.median_s * math.exp(-2 * hoped.deviation) < known_s


@dataclass(frozen=True, slots=True)
class _Other:
    """A change of nodes or cut, and what is expected of it for the rest of the job."""

    seconds: float
    verdict: Verdict


def _other_of_the_same(
    considered: Consideration, standing: Standing, arms: Mapping[str, Arm], left: int, switch_s: float
) -> _Other | None:
    """The same strategy over other nodes or cut otherwise: a node has come, or one is slower than it was.

    What runs is slower than was predicted by some factor. What its ranks' own computing does not explain of it would be
    so for the same nodes and more, too, and as far as TRANSFER says for others: what takes long may be left behind.
    """
    running = standing.plan
    placed = considered.placed.get(running.strategy)
    if placed is None or not _can_begin(considered, standing, running.strategy):
        return None
    if placed.cost.basis is None or running.estimate.basis is None or not running.estimate.step_s > 0:
        return None
    if placed.cost.basis.combination == running.estimate.basis.combination:
        return None
    comparable = running.cost_model_version == COST_MODEL_VERSION
    if not comparable and (frozenset(placed.nodes), placed.layout) == (standing.own, running.layout):
        return None  # other versions have other names for the same
    expected: Belief = belief(considered.arms[running.strategy], considered.residuals[running.strategy])
    step_s = placed.cost.step_s * expected.median_s / considered.arms[running.strategy].seconds
    if comparable and not placed.cost.basis.remembered:
        slower = max(1.0, standing.step_s / _explained_s(standing))
        if standing.own <= set(placed.nodes):
            step_s *= slower
        elif standing.told and len(placed.placements) > 1:
            step_s *= slower**TRANSFER
    band = RECUT if set(placed.nodes) == standing.own else BAND
    clearly = step_s * (1 + band) < standing.step_s
    if not clearly or not worth_switching(left * (standing.step_s - step_s), switch_s):
        return None
    names = {node.node_id: node.name for node in considered.inputs.cluster.nodes}
    message = f"{_said(names, standing.own, placed.nodes)}: {_against(step_s, standing.step_s)}"
    now, survival = way_of(considered, running), considered.survival[running.strategy]
    arm = Arm(left * step_s / survival, step_s, left, considered.arms[running.strategy].deviation, True)
    beside = _beside(considered, standing, running.strategy, now)
    as_it_is = {running.strategy + AS_IT_IS: arms[now]} if now == running.strategy else {}
    made = plan_of_way(beside, {**arms, **as_it_is, running.strategy: arm}, running.strategy, message)
    return _Other(arm.seconds, Verdict(message, made))


def _explained_s(standing: Standing) -> float:
    """The predicted step, with what the slowest rank computes as it turned out."""
    estimate = standing.plan.estimate
    if not standing.told:
        return estimate.step_s
    slowest_s = max(alone_s(rank, standing.times[number]) for number, rank in enumerate(estimate.ranks))
    return estimate.step_s + max(0.0, slowest_s - max(rank.compute_s for rank in estimate.ranks))


def _said(names: dict[NodeId, str], own: Collection[NodeId], planned: Collection[NodeId]) -> str:
    """late joins the group, slow is left out of it"""
    joining, leaving = (
        ", ".join(names[node_id] for node_id in sorted(nodes))
        for nodes in (set(planned) - set(own), set(own) - set(planned))
    )
    if not joining and not leaving:
        return "another cut of the same nodes"
    left = f"{leaving} is left out of it" if leaving else ""
    return ", ".join(part for part in (f"{joining} joins the group" if joining else "", left) if part)


def _against(step_s: float, before_s: float) -> str:
    return f"{1000 * step_s:.3g} ms a step expected, {1000 * before_s:.3g} ms measured"
