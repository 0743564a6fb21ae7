"""The groups that worked on a job before, each cut as it was: pure.

What a group of several nodes took for a step says little of the same nodes cut otherwise, or of some of them: a job
that tried something else goes back to what was measured, not to what is now predicted to be like it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from coordinator.other_nodes import AS_IT_IS, strategy_of, way_on
from coordinator.planner import Consideration, arm_of
from protos.plan import CostEstimate, NodeView, Placement, Plan
from strategies.base import Inputs, PlacedEstimate
from strategies.cost import COST_MODEL_VERSION, assumed_steps
from strategies.grouping import groups
from strategies.learned import memory_factor
from strategies.links import ranks_of
from strategies.memory import budget_bytes
from strategies.survival import efficiency


def as_placed(plan: Plan) -> PlacedEstimate:
    """What a plan says of where each rank is, in the form in which strategies say it."""
    placements = tuple(
        Placement(part.rank, part.node_id, part.data_range[1] - part.data_range[0], part.stage, part.replica)
        for part in plan.subtasks
    )
    return PlacedEstimate(
        plan.estimate,
        placements,
        tuple(part.accumulate for part in plan.subtasks),
        plan.steps,
        plan.coordination_plan.network,
        compression=plan.coordination_plan.compression,
        layout=plan.layout,
        links=plan.links,
    )


def with_earlier(considered: Consideration, plans: Iterable[Plan], running: Plan) -> Consideration:
    """The same, and the groups of several nodes of `plans` that could work again, each as a way of its own
    (coordinator/other_nodes.py); not those that work now or are what is predicted best anyway."""
    found = considered
    known = {_combination(running.estimate), *(_combination(each.cost) for each in considered.placed.values())}
    for plan in plans:
        again = _again(considered, plan)
        if again is None or _combination(again.cost) in known:
            continue
        way = way_on(considered, plan.strategy, _nodes(considered, again))
        if way not in found.arms or again.cost.seconds < found.placed[way].cost.seconds:
            found = _with(found, way, again)
    return found


def beside_itself(considered: Consideration, running: Plan, step_s: float) -> Consideration:
    """The same, and the group that runs as a row of its own, as if it had made the whole job: for a change to another
    one of its strategy."""
    return _with(considered, running.strategy + AS_IT_IS, _measured(considered.inputs, running, step_s))


def _with(considered: Consideration, way: str, placed: PlacedEstimate) -> Consideration:
    inputs, strategy = considered.inputs, strategy_of(way)
    survives = efficiency(_nodes(considered, placed), placed.layout, inputs.spec.checkpoint.every_s)
    arm = arm_of(inputs, placed, survives, considered.deviations[strategy])
    return replace(
        considered,
        placed={**considered.placed, way: placed},
        arms={**considered.arms, way: arm},
        survival={**considered.survival, way: survives},
        residuals={**considered.residuals, way: considered.residuals[strategy]},
    )


def _nodes(considered: Consideration, placed: PlacedEstimate) -> list[NodeView]:
    views = {node.node_id: node for node in considered.inputs.cluster.nodes}
    return [views[node_id] for node_id in dict.fromkeys(placed.nodes) if node_id in views]


def _combination(cost: CostEstimate) -> str | None:
    return cost.basis.combination if cost.basis is not None else None


def _again(considered: Consideration, plan: Plan) -> PlacedEstimate | None:
    """With the step that was measured; None where it says nothing any more, or the group could not form."""
    inputs, basis = considered.inputs, plan.estimate.basis
    step_s = inputs.cluster.learned.steps.get(basis.combination) if basis is not None else None
    if basis is None or step_s is None or plan.cost_model_version != COST_MODEL_VERSION:
        return None
    if plan.strategy not in considered.placed or not _can_form(inputs, plan):
        return None
    return _measured(inputs, plan, step_s)


def _measured(inputs: Inputs, plan: Plan, step_s: float) -> PlacedEstimate:
    """What a plan says, with the step that was measured in the place of the predicted one."""
    estimate, basis = plan.estimate, plan.estimate.basis
    steps = assumed_steps(inputs.profile, inputs.spec.train, inputs.data)
    seconds = max(0.0, estimate.seconds + steps * (step_s - estimate.step_s))
    known = None if basis is None else replace(basis, remembered=True)
    return replace(as_placed(plan), cost=replace(estimate, seconds=seconds, step_s=step_s, basis=known))


def _can_form(inputs: Inputs, plan: Plan) -> bool:
    """Whether its nodes are still in one network, with room for as many ranks and as much memory."""
    ranks, network = Counter(part.node_id for part in plan.subtasks), plan.coordination_plan.network
    for group in groups(inputs):
        nodes = {node.node_id: node for node in group.nodes}
        if len(ranks) > 1 and group.network == network and ranks.keys() <= nodes.keys():
            return all(
                plan.estimate.memory_bytes[node_id] <= budget_bytes(nodes[node_id])
                and (not nodes[node_id].capacity.gpus or count <= ranks_of(nodes[node_id]))
                for node_id, count in ranks.items()
            ) and all(memory_factor(inputs, nodes[rank.node_id]) <= rank.memory_factor for rank in plan.estimate.ranks)
    return False
