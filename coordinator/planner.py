"""From a job, what is known of its model and data, and the cluster, to the plan: pure.

Enumerates all five strategies, drops those that cannot be with their reasons, lets the cost model rank the rest and the
Q-table correct the ranking. The reason always comes with the decision. Refuses (NoPlacement) rather than guesses.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations

from coordinator.smallest_change import smallest_changes
from coordinator.unplaced import NothingFits
from protos.ids import NodeId, PlanId, new_plan_id
from protos.jobspec import JobSpec, StrategyName, StrategyOptions
from protos.model import ModelProfile
from protos.plan import Candidate, ClusterView, CoordinationPlan, DataProfile, Layout, Plan, SparePlan
from protos.states import Activity
from qtable.backoff import deviations, residuals
from qtable.policy import BAND, FAR, Arm, Ledger, choose, masked
from qtable.probing import REPEAT_DEVIATION, belief, expected_loss_s
from qtable.state import Observation, StateKey
from qtable.table import QTable
from strategies.base import NOT_BUILT, Inputs, PlacedEstimate
from strategies.cost import COST_MODEL_VERSION, assumed_rows, assumed_steps
from strategies.grouping import REACH, left_out
from strategies.links import median_rtt_s, worst_link
from strategies.memory import GRADIENT_BYTES, bytes_per_parameter
from strategies.registry import BUILT
from strategies.survival import efficiency

RENDEZVOUS = "store over the session stream"
RETRIES = 3
REGROUP_S = 3.0  # ranks stop, a new group forms and begins, without the way of the state
SPARES_OF_TWO = 8  # nodes of a plan, up to which the loss of any two is looked at; half of that where stages are cut
_START_DEADLINE_S, _LONGEST_START_S = 120.0, 3600.0


@dataclass(frozen=True, slots=True)
class Consideration:
    """Everything that was weighed: a candidate per strategy, and the placed estimate of each feasible one."""

    inputs: Inputs
    key: StateKey
    candidates: tuple[Candidate, ...]
    placed: dict[str, PlacedEstimate]
    residuals: dict[str, float]
    arms: dict[str, Arm]  # of each feasible one; the time of the whole job, losses of nodes included
    survival: dict[str, float]
    deviations: dict[str, float]  # of predictions of each action, by the table

    def expected_s(self, strategy: str) -> float:
        """The prediction as the table and the losses to be expected correct it."""
        return belief(self.arms[strategy], self.residuals[strategy]).median_s

    def quickest(self) -> str:
        return min((name for name in self.placed if name not in masked(self.arms)), key=self.expected_s)

    @property
    def switch_s(self) -> float:
        """What changing a running job from one plan to another costs: a new group, and the state to all of it."""
        nodes = {placement.node_id for placed in self.placed.values() for placement in placed.placements}
        views = [node for node in self.inputs.cluster.nodes if node.node_id in nodes]
        if len(views) < 2:
            return REGROUP_S
        held = bytes_per_parameter(self.inputs.spec.train.optimizer) - GRADIENT_BYTES
        state_bytes = self.inputs.profile.parameters * held
        return REGROUP_S + state_bytes / worst_link(self.inputs.cluster, views).bytes_per_s


def plan(
    spec: JobSpec,
    profile: ModelProfile,
    data: DataProfile,
    cluster: ClusterView,
    table: QTable,
    rng: random.Random,
    ledger: Ledger,
    *,
    plan_id: PlanId | None = None,
) -> Plan:
    """The plan of a job that starts. A strategy the job file names is taken or refused, never replaced.

    Raises NoPlacement whose message holds the reasons of every strategy that was considered.
    """
    considered = consider(Inputs(spec, profile, data, cluster), table)
    if spec.strategy != "auto":
        return _forced(considered, spec.strategy, "as the job file asks", plan_id)
    if not considered.placed:
        raise _no_placement(considered, StrategyName)
    choice = choose(considered.arms, considered.residuals, rng, ledger, switch_s=considered.switch_s)
    return replace(
        plan_of(considered, choice.action, choice.reason, choice.propensity, plan_id),
        trials=choice.trials,
        trial_steps=choice.trial_steps,
        explored_loss_s=choice.charge_s,
    )


def replan(
    previous: str,
    spec: JobSpec,
    profile: ModelProfile,
    data: DataProfile,
    cluster: ClusterView,
    table: QTable,
    *,
    holders: Iterable[NodeId] = (),
    plan_id: PlanId | None = None,
) -> Plan:
    """The plan with which an interrupted job goes on: the same strategy if it still fits, else the quickest that does.

    At least one of `holders` (nodes that have the newest state) takes part. Results do not depend on the strategy, so a
    strategy the job file names gives way to another one here rather than to waiting; nodes.min never gives way. Under
    `auto` another strategy takes over only when it is quicker by more than the band of the choice. A job on one node
    that was asked to be data-parallel becomes so again.
    """
    considered = consider(without_shape(Inputs(spec, profile, data, cluster, frozenset(holders)), previous), table)
    if not considered.placed:
        raise _no_placement(considered, dict.fromkeys((previous, *BUILT)))
    if spec.strategy in considered.placed and previous != spec.strategy:
        return _forced(considered, spec.strategy, "as the job file asks, now that it can be", plan_id)
    quickest = considered.quickest()
    if previous not in considered.placed:
        lost = next(candidate for candidate in considered.candidates if candidate.strategy == previous)
        return _forced(considered, quickest, f"{previous} is over: {'; '.join(lost.reasons)}", plan_id)
    if spec.strategy == "auto" and considered.expected_s(quickest) * (1 + BAND) < considered.expected_s(previous):
        return _forced(considered, quickest, f"quicker than {previous} with the nodes that are left", plan_id)
    return _forced(considered, previous, "goes on as before with the nodes that are left", plan_id)


def without_shape(inputs: Inputs, previous: str) -> Inputs:
    """Options of a strategy are kept while they can be: with fewer nodes there may be no such number of stages."""
    spec = inputs.spec
    if spec.strategy_options is None or previous not in BUILT or not BUILT[StrategyName(previous)].feasible(inputs):
        return inputs
    return replace(inputs, spec=spec.model_copy(update={"strategy_options": None}))


def spare_plans(
    made: Plan, spec: JobSpec, profile: ModelProfile, data: DataProfile, cluster: ClusterView
) -> tuple[SparePlan, ...]:
    """How the job would go on without any one node of the plan, and without any two of a few: what `replan` would do,
    as far as can be said beforehand. Every node is taken to have the newest state."""
    return tuple(_spare(made, Inputs(spec, profile, data, without(cluster, lost)), lost) for lost in losses(made))


def losses(made: Plan) -> tuple[tuple[NodeId, ...], ...]:
    """Those that are worth a plan beforehand: of every node, and of every two where they are few."""
    used = tuple(dict.fromkeys(subtask.node_id for subtask in made.subtasks))
    few = len(used) <= (SPARES_OF_TWO if made.layout is None else SPARES_OF_TWO // 2)
    return (*combinations(used, 1), *(combinations(used, 2) if few and len(used) > 2 else ()))


def without(cluster: ClusterView, lost: tuple[NodeId, ...]) -> ClusterView:
    """The same without some nodes and all that is known of their links."""
    gone = set(lost)
    return replace(
        cluster,
        nodes=tuple(node for node in cluster.nodes if node.node_id not in gone),
        links={pair: link for pair, link in cluster.links.items() if gone.isdisjoint(pair)},
        apart={pair: why for pair, why in cluster.apart.items() if gone.isdisjoint(pair)},
    )


def _spare(made: Plan, inputs: Inputs, lost: tuple[NodeId, ...]) -> SparePlan:
    strategy = BUILT[StrategyName(made.strategy)]
    inputs = without_shape(inputs, made.strategy)
    alike = _as_fine(inputs, made)
    reasons = strategy.feasible(alike)
    if not reasons:
        placed = strategy.estimate(alike)
        return SparePlan(lost, made.strategy, tuple(dict.fromkeys(placed.nodes)), placed.cost.seconds)
    others = {name: each.estimate(inputs) for name, each in BUILT.items() if not each.feasible(inputs)}
    if not others:
        return SparePlan(lost, "", (), reason="; ".join(reasons))
    name, placed = min(others.items(), key=lambda other: other[1].cost.seconds)
    return SparePlan(lost, name.value, tuple(dict.fromkeys(placed.nodes)), placed.cost.seconds, "; ".join(reasons))


def _as_fine(inputs: Inputs, made: Plan) -> Inputs:
    """A pipeline with as many micro-batches as the one that was made: looking for a better number takes most of the
    time of a plan, and there are many losses to look at."""
    if made.strategy != StrategyName.PIPELINE_PARALLEL or made.layout is None:
        return inputs
    options = StrategyOptions(microbatches=made.subtasks[0].accumulate, schedule=made.layout.schedule)
    return replace(inputs, spec=inputs.spec.model_copy(update={"strategy": made.strategy, "strategy_options": options}))


def placeable_when_idle(spec: JobSpec, profile: ModelProfile, data: DataProfile, cluster: ClusterView) -> bool:
    """Whether the job would find a place once the nodes that are busy have finished: wait for them, or say no."""
    idle = tuple(
        replace(node, activity=Activity.IDLE) if node.activity is Activity.BUSY else node for node in cluster.nodes
    )
    inputs = Inputs(spec, profile, data, replace(cluster, nodes=idle))
    wanted = [s for name, s in BUILT.items() if spec.strategy in ("auto", name.value)]
    return any(not strategy.feasible(inputs) for strategy in wanted)


def consider(inputs: Inputs, table: QTable) -> Consideration:
    """Ask every strategy, in the order of StrategyName."""
    nodes = inputs.eligible
    observation = Observation(
        inputs.profile.parameters,
        assumed_rows(inputs.profile, inputs.data),
        len(nodes),
        median_rtt_s(inputs.cluster, nodes),
    )
    key = observation.key
    learned = residuals(table, key)
    placed: dict[str, PlacedEstimate] = {}
    reasons: dict[str, tuple[str, ...]] = {}
    for name in StrategyName:
        strategy = BUILT.get(name)
        reasons[name.value] = (NOT_BUILT,) if strategy is None else strategy.feasible(inputs)
        if strategy is not None and not reasons[name.value]:
            placed[name.value] = strategy.estimate(inputs)
    views = {node.node_id: node for node in inputs.cluster.nodes}
    every_s, spread = inputs.spec.checkpoint.every_s, deviations(table, key)
    arms: dict[str, Arm] = {}
    survival: dict[str, float] = {}
    for action, estimate in placed.items():
        survival[action] = efficiency((views[node] for node in estimate.nodes), estimate.layout, every_s)
        arms[action] = arm_of(inputs, estimate, survival[action], spread[action])
    best_s = min((arm.seconds for arm in arms.values()), default=0.0)
    candidates = []
    for name in StrategyName:
        candidate = Candidate(
            strategy=name.value,
            feasible=name.value in placed,
            reasons=reasons[name.value],
            q=table.value(key, name.value),
            residual=learned[name.value],
            visits=table.visits(key, name.value),
        )
        if name.value in arms:
            candidate = replace(candidate, survival=survival[name.value])
            candidate = predicted(inputs, candidate, placed[name.value], arms[name.value], best_s)
        candidates.append(candidate)
    return Consideration(inputs, key, tuple(candidates), placed, learned, arms, survival, spread)


def predicted(inputs: Inputs, candidate: Candidate, estimate: PlacedEstimate, arm: Arm, best_s: float) -> Candidate:
    """The candidate with what is predicted of it; `best_s`: of the quickest one."""
    ratio = arm.seconds / best_s
    far = (f"predicted {ratio:.1f} times the best: never explored",) if ratio > FAR and not arm.measured else ()
    steps = estimate.steps or assumed_steps(inputs.profile, inputs.spec.train, inputs.data)
    apart = left_out(inputs) if len(estimate.placements) > 1 else ()
    return replace(
        candidate,
        reasons=(*far, *apart),
        nodes=estimate.nodes,
        seconds=arm.seconds,
        deviation=arm.deviation,
        measured=arm.measured,
        step_s=estimate.cost.step_s,
        bytes=estimate.cost.bytes_per_step * steps,
        memory_bytes=estimate.cost.peak_memory_bytes,
        terms=estimate.cost.terms,
    )


def arm_of(inputs: Inputs, placed: PlacedEstimate, survival: float, deviation: float) -> Arm:
    """A step that was measured in this very combination needs no correction, and comes again as it was."""
    basis, train = placed.cost.basis, inputs.spec.train
    measured = basis is not None and basis.remembered
    steps = placed.steps or int(assumed_steps(inputs.profile, train, inputs.data))
    spread = REPEAT_DEVIATION if measured else deviation
    return Arm(placed.cost.seconds / survival, placed.cost.step_s, steps, spread, measured)


def _forced(considered: Consideration, strategy: str, why: str, plan_id: PlanId | None) -> Plan:
    if strategy not in considered.placed:
        raise _no_placement(considered, (strategy,))
    return plan_of(considered, strategy, why, 1.0, plan_id)


def plan_of(considered: Consideration, strategy: str, why: str, propensity: float, plan_id: PlanId | None) -> Plan:
    inputs, placed = considered.inputs, considered.placed[strategy]
    subtasks = BUILT[StrategyName(strategy)].decompose(inputs, placed)
    far = masked(considered.arms, strategy)
    beliefs = {k: belief(arm, considered.residuals[k]) for k, arm in considered.arms.items() if k not in far}
    return Plan(
        id=plan_id or new_plan_id(),
        strategy=strategy,
        reason=_sentence(considered, strategy, why),
        candidates=considered.candidates,
        subtasks=subtasks,
        coordination_plan=_coordination(placed),
        estimate=placed.cost,
        state=(considered.key.complexity, considered.key.samples, considered.key.nodes, considered.key.latency),
        propensity=propensity,
        parameters=inputs.profile.parameters,
        steps=placed.steps,
        expected_loss_s=expected_loss_s(strategy, beliefs),
        layout=placed.layout,
        links=placed.links,
        cost_model_version=COST_MODEL_VERSION,
    )


def _coordination(placed: PlacedEstimate) -> CoordinationPlan:
    alone = len(placed.placements) == 1
    barriers = () if alone else ("process group formed", "newest state broadcast", *_every_step(placed.layout))
    return CoordinationPlan(
        rendezvous="" if alone else RENDEZVOUS,
        network=placed.network,
        order=("offer", "fetch", "ready", "train", "evaluate", "deliver")
        if alone
        else ("offer", "fetch", "rendezvous", "synchronise state", "ready", "train", "evaluate", "deliver"),
        barriers=barriers,
        deadline_s=min(_LONGEST_START_S, max(_START_DEADLINE_S, 60.0 + 3 * placed.transfer_s)),
        retries=RETRIES,
        compression=placed.compression,
    )


def _every_step(layout: Layout | None) -> tuple[str, ...]:
    """What the ranks wait for in each other's steps."""
    if layout is None:
        return ("gradients averaged, every step",)
    if layout.sharded:
        return ("shards gathered and gradients scattered, every block of every step",)
    if layout.tensor > 1:
        return ("parts of layers added up, every layer of every step",)
    averaged = ("gradients of each stage averaged, every step",) if layout.replicas > 1 else ()
    return ("activations and their gradients handed on, every micro-batch", *averaged)


def _sentence(considered: Consideration, strategy: str, why: str) -> str:
    """The choice, the predictions beside it and what was not possible, for a person."""
    names = {node.node_id: node.name for node in considered.inputs.cluster.nodes}
    chosen = considered.placed[strategy]
    where = ", ".join(dict.fromkeys(names[node] for node in chosen.nodes))
    parts = [f"{strategy} on {where}{_shape(chosen)}: predicted {_seconds(chosen.cost.seconds)}{_sync(chosen)}"]
    for candidate in considered.candidates:
        if candidate.strategy == strategy:
            continue
        if candidate.seconds is not None:
            other = considered.placed[candidate.strategy]
            parts.append(f"{candidate.strategy} {_seconds(candidate.seconds)}{_sync(other)}")
        elif candidate.reasons != (NOT_BUILT,):
            parts.append(f"{candidate.strategy} not possible ({'; '.join(candidate.reasons)})")
    return f"{', '.join(parts)}; {why}"


def _shape(placed: PlacedEstimate) -> str:
    layout = placed.layout
    if layout is None:
        return ""
    if len(layout.stages) > 1:
        replicas = f" x {layout.replicas} replicas" if layout.replicas > 1 else ""
        return f" ({len(layout.stages)} stages{replicas}, {placed.accumulate[0]} micro-batches, {layout.schedule})"
    if layout.sharded:
        return f" ({len(placed.placements)} shards)"
    return f" (every layer in {layout.tensor} parts)" if layout.tensor > 1 else " (activations computed again)"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"


def _sync(placed: PlacedEstimate) -> str:
    exposed_s = placed.cost.terms.get("sync", 0.0) + placed.cost.terms.get("codec", 0.0)
    return f" (sync {exposed_s / placed.cost.step_s:.0%} of a step)" if len(placed.placements) > 1 else ""


def _no_placement(considered: Consideration, wanted: Iterable[str]) -> NothingFits:
    reasons = {c.strategy: "; ".join(c.reasons) for c in considered.candidates if c.strategy in set(wanted)}
    said = [f"{name}: {why}." for name, why in reasons.items() if why != NOT_BUILT]
    missing = [name for name, why in reasons.items() if why == NOT_BUILT]
    if missing:
        said.append(f"{', '.join(missing)}: {NOT_BUILT}.")
    hint = _hint(considered, reasons)
    return NothingFits(f"no plan fits the cluster. {' '.join(said)}", hint, considered.candidates)


def _hint(considered: Consideration, reasons: dict[str, str]) -> str:
    inputs = considered.inputs
    if not inputs.profile.trainable:
        return "convert the model as the reason says; hive plan shows what hive sees in it"
    if not inputs.cluster.nodes:
        return "start hive-node on a machine: hive token create prints the command to type there"
    if inputs.spec.nodes.require.gpu and not any(node.capacity.gpus for node in inputs.cluster.nodes):
        return "no node lends a GPU (hive nodes): start hive-node on a machine with one, or drop nodes.require.gpu"
    if not inputs.eligible:
        return "hive nodes shows each node's state; hive-node resume and hive node uncordon bring one back"
    if any("--trusted-lan" in why for why in reasons.values()):
        return "restart the nodes of one LAN with --trusted-lan IFACE|CIDR, or use strategy: single_node"
    if any(REACH in why for why in reasons.values()):
        return (
            "start every node without --no-peer and open its peer port to the others (hive nodes shows it), or use "
            "strategy: single_node"
        )
    changes = smallest_changes(inputs, considered.placed)
    if changes:
        return f"what would make it fit: {'; or '.join(changes)}"
    return "hive nodes shows what each node grants; grant more, add a node, or ask for less under nodes: and train:"
