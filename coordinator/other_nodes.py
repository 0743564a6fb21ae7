"""A job on one node, on each of the nodes that could have it: pure.

Nodes of one kind often differ by more than their calibrations say, and which of them suits a model shows only when it
runs there. So a running job weighs single_node on every node, each as a way of its own that can be tried like a
strategy. Their names are for people; `strategy_of` says which strategy one is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from coordinator.planner import Consideration, arm_of, plan_of, predicted, without
from protos.jobspec import StrategyName
from protos.plan import Candidate, NodeView, Plan
from qtable.policy import masked
from qtable.probing import Arm, belief, expected_loss_s
from strategies.base import PlacedEstimate
from strategies.registry import BUILT
from strategies.survival import efficiency

SINGLE = StrategyName.SINGLE_NODE.value
AS_IT_IS = " as it is"  # the group that runs, beside another one of its strategy
_ON = " on "


def way_on(considered: Consideration, strategy: str, nodes: Iterable[NodeView]) -> str:
    """Of a strategy on these nodes."""
    return f"{strategy}{_ON}{', '.join(_name(considered, node) for node in nodes)}"


def strategy_of(way: str) -> str:
    return way.split(_ON)[0].removesuffix(AS_IT_IS)


def with_other_nodes(considered: Consideration) -> Consideration:
    """The same, and single_node on every node that it did not choose."""
    if SINGLE not in considered.placed:
        return considered
    inputs, chosen = considered.inputs, considered.placed[SINGLE].nodes
    placed, arms = dict(considered.placed), dict(considered.arms)
    survival, residuals = dict(considered.survival), dict(considered.residuals)
    for node in inputs.eligible:
        way = None if node.node_id in chosen else _alone(considered, node)
        if way is None:
            continue
        name = way_on(considered, SINGLE, [node])
        survival[name] = efficiency([node], way.layout, inputs.spec.checkpoint.every_s)
        placed[name], residuals[name] = way, residuals[SINGLE]
        arms[name] = arm_of(inputs, way, survival[name], considered.deviations[SINGLE])
    return replace(considered, placed=placed, arms=arms, survival=survival, residuals=residuals)


def way_of(considered: Consideration, plan: Plan) -> str:
    """By which of the ways of `with_other_nodes` a plan runs."""
    nodes = {subtask.node_id for subtask in plan.subtasks}
    if plan.strategy == SINGLE:
        for name, placed in considered.placed.items():
            if strategy_of(name) == SINGLE and set(placed.nodes) == nodes:
                return name
    return plan.strategy


def said(considered: Consideration, way: str) -> str:
    """Of a job on one node always with the node's name."""
    if way != SINGLE or way not in considered.placed:
        return way
    (node_id,) = considered.placed[way].nodes
    node = next(node for node in considered.inputs.cluster.nodes if node.node_id == node_id)
    return way_on(considered, SINGLE, [node])


def plan_of_way(
    considered: Consideration,
    arms: Mapping[str, Arm],
    way: str,
    why: str,
    trials: tuple[str, ...] = (),
    trial_steps: int = 0,
) -> Plan:
    """To change a running job to; `arms` are of what is left of it. Its candidates say of the strategy what is
    predicted of this way; the other ways of it that were measured, or wait for their trial, stand beside it."""
    strategy, placed = strategy_of(way), considered.placed[way]
    row = _row(considered, strategy, way)
    candidates = tuple(row if each.strategy == strategy else each for each in considered.candidates)
    taken = replace(considered, placed={**considered.placed, strategy: placed}, candidates=candidates)
    made = plan_of(taken, strategy, why, 1.0, None)
    weighed = {name: arm for name, arm in arms.items() if name not in masked(arms, way)}
    beliefs = {name: belief(arm, considered.residuals.get(name, 0.0)) for name, arm in weighed.items()}
    return replace(
        made,
        candidates=(*made.candidates, *_others(considered, way, trials)),
        trials=trials,
        trial_steps=trial_steps,
        expected_loss_s=expected_loss_s(way, beliefs),
    )


def _others(considered: Consideration, way: str, trials: tuple[str, ...]) -> tuple[Candidate, ...]:
    others = [other for other in considered.placed if other not in (strategy_of(other), way)]
    if strategy_of(way) == SINGLE != way:
        others.append(SINGLE)  # on the node that was chosen: its row has become that of another one
    return tuple(
        _row(considered, said(considered, other), other)
        for other in others
        if considered.arms[other].measured or other in trials
    )


def _row(considered: Consideration, name: str, way: str) -> Candidate:
    """What is predicted of one way, under a name for people."""
    of_strategy = next(each for each in considered.candidates if each.strategy == strategy_of(way))
    best_s = min(each.seconds for each in considered.arms.values())
    row = replace(of_strategy, strategy=name, survival=considered.survival[way])
    return predicted(considered.inputs, row, considered.placed[way], considered.arms[way], best_s)


def _name(considered: Consideration, node: NodeView) -> str:
    """The id where another node has the same name."""
    alike = [each for each in considered.inputs.cluster.nodes if each.name == node.name]
    return node.name if len(alike) == 1 else node.node_id


def _alone(considered: Consideration, node: NodeView) -> PlacedEstimate | None:
    inputs, single = considered.inputs, BUILT[StrategyName.SINGLE_NODE]
    others = tuple(each.node_id for each in inputs.cluster.nodes if each.node_id != node.node_id)
    alone = replace(inputs, cluster=without(inputs.cluster, others))
    return None if single.feasible(alone) else single.estimate(alone)
