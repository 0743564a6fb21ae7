"""The model itself shared among nodes: its parameters cut into shards, or its single layers cut (tensor parallel).

Sharded: every rank keeps 1/k of weights, gradients and optimizer state and gathers each block while it runs, so a model
larger than any node trains. Tensor: every rank computes a part of each linear layer on the whole batch; only for very
short round trips. The faster is the plan. Where every node holds the whole model shards are left out unless the job
file names the strategy: data_parallel does the same work and sends less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from protos.jobspec import StrategyName
from protos.plan import NodeView, PlannedSubtask
from strategies import cost
from strategies.base import Answer, Inputs, PlacedEstimate, gib, placed_of, reasons_of, train_subtasks
from strategies.grouping import close_groups, group_reasons, groups
from strategies.links import ranks_of, worst_link
from strategies.memory import SHARE, budget_bytes, largest_micro_batch, sample_bytes
from strategies.shard_estimate import MOST_RANKS_PER_NODE, shard_bytes, sharded, virtual
from strategies.shared_model import Ranks, together
from strategies.tensor_estimate import TENSOR_RTT_S, tensor

SHARDED, TENSOR = "sharded", "tensor"


@dataclass(frozen=True, slots=True)
class ModelParallel:
    name: StrategyName = StrategyName.MODEL_PARALLEL

    def feasible(self, inputs: Inputs) -> tuple[str, ...]:
        return reasons_of(inputs.answer(self.name, _answer))

    def estimate(self, inputs: Inputs) -> PlacedEstimate:
        return placed_of(self.name, inputs.answer(self.name, _answer))

    def decompose(self, inputs: Inputs, placed: PlacedEstimate) -> tuple[PlannedSubtask, ...]:
        sharded = placed.layout is not None and placed.layout.sharded
        return train_subtasks(inputs, placed, "shards" if sharded else "all_reduce")


def _answer(inputs: Inputs) -> Answer:
    if reasons := group_reasons(inputs):
        return reasons
    if inputs.spec.sync.compression == "fp16":
        return ("sync.compression: fp16 is for gradients that are averaged whole: set it to auto or none",)
    if inputs.profile.format == "pytorch_export":
        return ("an exported program is one graph without the modules that are sharded: pipeline_parallel can cut it",)
    asked = inputs.options(StrategyName.MODEL_PARALLEL)
    if asked.ranks is not None and asked.ranks > max(_most_ranks(group.nodes) for group in groups(inputs)):
        most = max(_most_ranks(group.nodes) for group in groups(inputs))
        return (f"{asked.ranks} ranks were asked for, the nodes of one network run {most} at most",)
    best: PlacedEstimate | None = None
    for placed in _candidates(inputs):
        if best is None or placed.cost.seconds < best.cost.seconds:
            best = placed
    return best or _last_reasons(inputs)


def _most_ranks(nodes: Sequence[NodeView]) -> int:
    return sum(len(node.capacity.gpus) or MOST_RANKS_PER_NODE for node in nodes)


def _candidates(inputs: Inputs) -> Iterator[PlacedEstimate]:
    """Prefixes of every group, fastest node first, one that holds the newest state before all others."""
    asked, bounds = inputs.options(StrategyName.MODEL_PARALLEL), inputs.spec.nodes
    train, holding = inputs.spec.train, inputs.holding
    speeds = {node.node_id: cost.speed(inputs.profile, node.capacity, train) for node in inputs.eligible}
    parts = asked.kind != SHARDED and not _why_no_tensor(inputs)
    shards = asked.kind != TENSOR and not (inputs.spec.strategy == "auto" and _whole_everywhere(inputs))
    for group in close_groups(inputs):
        units = sorted(
            (node for node in group.nodes for _ in range(ranks_of(node))),
            key=lambda node: (speeds[node.node_id].step_s(train.batch_size), node.name),
        )
        if holding:
            first = next(node for node in units if node.node_id in holding)
            units = [first, *(node for node in units if node is not first)]
        most = max(k for k in range(len(units) + 1) if len({node.node_id for node in units[:k]}) <= bounds.max)
        for count in range(2, most + 1) if asked.ranks is None else (min(asked.ranks, most),):
            if len({node.node_id for node in units[:count]}) < bounds.min:
                continue
            ranks = virtual(inputs, units[:count], group.network) if shards else None
            found = None if ranks is None else sharded(inputs, ranks)
            if found is not None:
                yield found
            cut = tensor(inputs, Ranks(together(units[:count]), group.network)) if parts else None
            if cut is not None:
                yield cut


def _whole_everywhere(inputs: Inputs) -> bool:
    optimizer = inputs.spec.train.optimizer
    nodes = [node for group in groups(inputs) for node in group.nodes]
    return all(largest_micro_batch(inputs.profile, optimizer, node, 2, 1) for node in nodes)


def _why_no_tensor(inputs: Inputs) -> str:
    profile = inputs.profile
    return f"tensor parallel: {profile.why_not_tensor}" if profile.why_not_tensor else ""


def _last_reasons(inputs: Inputs) -> tuple[str, ...]:
    asked = inputs.options(StrategyName.MODEL_PARALLEL)
    nodes = max(
        (group.nodes for group in groups(inputs)), key=lambda group: sum(b.capacity.memory_bytes for b in group)
    )
    if asked.kind == TENSOR:
        return (_no_tensor(inputs, asked.ranks, nodes),)
    if inputs.spec.strategy == "auto" and _whole_everywhere(inputs):
        sharing = "every node holds the whole model: data_parallel does the same work as shards and sends less"
        return (sharing, _no_tensor(inputs, asked.ranks, nodes))
    ranks = asked.ranks or _most_ranks(nodes)
    if inputs.spec.train.batch_size < (asked.ranks or 2):
        return (f"a batch of {inputs.spec.train.batch_size} samples has none for each of {asked.ranks or 2} ranks",)
    need = shard_bytes(inputs, ranks) + sample_bytes(inputs.profile)
    roomiest = max(nodes, key=budget_bytes)
    return (
        f"needs {gib(need)} for each of {ranks} shards and one sample, {SHARE:.0%} of what {roomiest.name} grants is "
        f"{gib(budget_bytes(roomiest))}",
    )


def _no_tensor(inputs: Inputs, ranks: int | None, nodes: Sequence[NodeView]) -> str:
    if why := _why_no_tensor(inputs):
        return why
    able = inputs.profile.tensor_ranks
    most = sum(map(ranks_of, nodes))
    if min(able) > most if ranks is None else ranks not in able:
        several = ", ".join(map(str, able))
        return f"tensor parallel: no layer can be cut among {ranks or most} ranks; among {several} it can"
    link = worst_link(inputs.cluster, nodes)
    if link.rtt_s > TENSOR_RTT_S:
        return f"tensor parallel: a round trip of {1000 * link.rtt_s:.1f} ms is over {1000 * TENSOR_RTT_S:.0f} ms"
    return "tensor parallel: what is not cut (embeddings, activations of one sample) fits no node"
