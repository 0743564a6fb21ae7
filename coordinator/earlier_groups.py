"""The groups that worked on a job before, each cut as it was: pure.

What a group of several nodes took for a step says little of the same nodes cut otherwise, or of some of them: a job
that tried something else goes back to what was measured, not to what is now predicted to be like it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from coordinator.other_nodes import way_on
from coordinator.planner import Consideration, arm_of
from protos.plan import CostEstimate, Placement, Plan
from strategies.base import Inputs, PlacedEstimate
from strategies.cost import COST_MODEL_VERSION, assumed_steps
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
    inputs = considered.inputs
    placed, arms = dict(considered.placed), dict(considered.arms)
    survival, residuals = dict(considered.survival), dict(considered.residuals)
    eligible = {node.node_id: node for node in inputs.eligible}
    known = {_combination(running.estimate), *(_combination(each.cost) for each in placed.values())}
    for plan in plans:
        again = _again(inputs, plan)
        if again is None or _combination(again.cost) in known or plan.strategy not in considered.deviations:
            continue
        nodes = [eligible[node_id] for node_id in dict.fromkeys(again.nodes) if node_id in eligible]
        if len(nodes) < max(2, len(set(again.nodes))) or any(
            again.cost.memory_bytes[node.node_id] > budget_bytes(node) for node in nodes
        ):
            continue
        way = way_on(considered, plan.strategy, nodes)
        survival[way] = efficiency(nodes, again.layout, inputs.spec.checkpoint.every_s)
        arm = arm_of(inputs, again, survival[way], considered.deviations[plan.strategy])
        if way not in arms or arm.seconds < arms[way].seconds:
            placed[way], arms[way], residuals[way] = again, arm, residuals[plan.strategy]
    return replace(considered, placed=placed, arms=arms, survival=survival, residuals=residuals)


def _combination(cost: CostEstimate) -> str | None:
    return cost.basis.combination if cost.basis is not None else None


def _again(inputs: Inputs, plan: Plan) -> PlacedEstimate | None:
    """With the step that was measured; None where it says nothing any more."""
    estimate, basis = plan.estimate, plan.estimate.basis
    step_s = inputs.cluster.learned.steps.get(basis.combination) if basis is not None else None
    if basis is None or step_s is None or plan.cost_model_version != COST_MODEL_VERSION:
        return None
    steps = assumed_steps(inputs.profile, inputs.spec.train, inputs.data)
    seconds = max(0.0, estimate.seconds + steps * (step_s - estimate.step_s))
    cost = replace(estimate, seconds=seconds, step_s=step_s, basis=replace(basis, remembered=True))
    return replace(as_placed(plan), cost=cost)
