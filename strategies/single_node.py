"""The whole job on the one node that finishes it first. Often the right answer, never just a fallback.

When memory asks, the batch is cut in pieces (gradient accumulation); where not even one sample fits, the blocks of the
model keep their inputs only and are computed again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from protos.jobspec import StrategyName
from protos.plan import CostEstimate, Layout, NodeView, Placement, PlannedSubtask, RankCost
from strategies import cost
from strategies.base import Answer, Inputs, PlacedEstimate, gib, placed_of, reasons_of, train_subtasks
from strategies.links import download_s
from strategies.memory import budget_bytes, largest_micro_batch, worker_bytes


@dataclass(frozen=True, slots=True)
class SingleNode:
    name: StrategyName = StrategyName.SINGLE_NODE

    def feasible(self, inputs: Inputs) -> tuple[str, ...]:
        return reasons_of(inputs.answer(self.name, _answer))

    def estimate(self, inputs: Inputs) -> PlacedEstimate:
        return placed_of(self.name, inputs.answer(self.name, _answer))

    def decompose(self, inputs: Inputs, placed: PlacedEstimate) -> tuple[PlannedSubtask, ...]:
        return train_subtasks(inputs, placed, "none")


@dataclass(frozen=True, slots=True)
class _Fit:
    node: NodeView
    largest: int  # micro-batch
    recompute: bool


def _answer(inputs: Inputs) -> Answer:
    if not inputs.profile.trainable:
        return (inputs.profile.why_not or "the model cannot be trained",)
    if inputs.spec.nodes.min > 1:
        return (f"nodes.min asks for {inputs.spec.nodes.min} nodes",)
    if not inputs.eligible:
        return ("no usable node" + (f": {', '.join(inputs.excluded)}" if inputs.excluded else " has joined"),)
    fitting = _fitting(inputs)
    if not fitting:
        return (memory_reason(inputs, inputs.eligible, 1),)
    holding = [fit for fit in fitting if fit.node.node_id in inputs.holders]
    return min((_on(inputs, fit) for fit in holding or fitting), key=lambda best: best.cost.seconds)


def memory_reason(inputs: Inputs, nodes: Sequence[NodeView], ranks: int) -> str:
    """Why the model does not even fit the roomiest of the nodes, in numbers."""
    train = inputs.spec.train
    node = max(nodes, key=budget_bytes)
    micro = 1 if train.accumulate == "auto" else math.ceil(train.batch_size / train.accumulate)
    need = worker_bytes(inputs.profile, train.optimizer, micro if ranks == 1 else 1, ranks, recompute=ranks == 1)
    what = f"{micro} samples at a time" if micro > 1 and ranks == 1 else "one sample at a time"
    return f"needs {gib(need)} for {what}, 85 % of what {node.name} grants is {gib(budget_bytes(node))}"


def micro_batches(inputs: Inputs, samples: int, largest: int) -> int:
    """Into how many pieces a rank cuts its samples: as the job file says, else the fewest that fit."""
    accumulate = inputs.spec.train.accumulate
    return math.ceil(samples / largest) if accumulate == "auto" else min(accumulate, samples)


def _fitting(inputs: Inputs) -> list[_Fit]:
    """Eligible nodes, the largest micro-batch of each, and whether it takes recomputing to get there."""
    train = inputs.spec.train
    wanted = train.batch_size if train.accumulate == "auto" else math.ceil(train.batch_size / train.accumulate)
    fitting = []
    for node in inputs.eligible:
        for recompute in (False, True):
            largest = largest_micro_batch(inputs.profile, train.optimizer, node, 1, wanted, recompute)
            if largest == wanted or (largest > 0 and train.accumulate == "auto"):
                fitting.append(_Fit(node, largest, recompute))
                break
    return fitting


def _on(inputs: Inputs, fit: _Fit) -> PlacedEstimate:
    profile, data, train, node = inputs.profile, inputs.data, inputs.spec.train, fit.node
    plain = cost.speed(profile, node.capacity, train)
    speed = plain.recomputing if fit.recompute else plain
    pieces = micro_batches(inputs, train.batch_size, fit.largest)
    compute_s, step_s = speed.compute_s(train.batch_size, pieces), speed.step_s(train.batch_size, pieces)
    startup_s, transfer_s = cost.startup_s(profile, [node.capacity]), download_s(data.bytes, node)
    evaluation_s = cost.evaluation_s(profile, train, data, [(plain, 1.0)])
    steps = cost.assumed_steps(profile, train, data)
    micro_batch = math.ceil(train.batch_size / pieces)
    memory = worker_bytes(profile, train.optimizer, micro_batch, 1, fit.recompute, pieces)
    layout = Layout(((0, len(profile.layers)),), checkpoint_activations=True) if fit.recompute else None
    return PlacedEstimate(
        CostEstimate(
            seconds=startup_s + transfer_s + steps * step_s + evaluation_s,
            step_s=step_s,
            bytes_per_step=0.0,
            memory_bytes={node.node_id: memory},
            terms={
                "compute": compute_s,
                "optimizer": speed.optimizer_s,
                "startup": startup_s,
                "transfer": transfer_s,
                "evaluation": evaluation_s,
            },
            ranks=(RankCost(node.node_id, step_s, pieces * speed.overhead_s, 0.0),),
        ),
        (Placement(0, node.node_id, train.batch_size),),
        (pieces,),
        cost.steps_of(train, data),
        transfer_s=transfer_s,
        layout=layout,
    )
