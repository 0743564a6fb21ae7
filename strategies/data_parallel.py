"""The same model on several nodes, each global batch cut into slices sized by their speed, gradients averaged.

Considered over the prefixes, fastest node first, of every group of nodes that share a trusted network; the prefix that
finishes first is the plan. Invariant: every rank of a plan has at least one sample of each full batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from protos.jobspec import StrategyName
from protos.plan import CostEstimate, NodeView, Placement, PlannedSubtask, RankCost
from strategies import cost
from strategies.base import Answer, Inputs, PlacedEstimate, placed_of, reasons_of, train_subtasks
from strategies.cost import Speed
from strategies.grouping import close_groups, group_reasons, groups
from strategies.links import (
    Link,
    all_have_gpu,
    carrying_s,
    download_s,
    link_between,
    link_uses,
    overlap_over,
    ranks_of,
    ring_traffic,
)
from strategies.memory import largest_micro_batch, worker_bytes
from strategies.partition import RankSpeed, alike, split_batch
from strategies.single_node import memory_reason, micro_batches

RANKS = 2  # of the memory formula: from two on it does not grow


@dataclass(frozen=True, slots=True)
class _Member:
    """A node of a group: what being in one costs it in a step, the `largest` micro-batch that fits, `cap` samples of a
    global batch it may take."""

    node: NodeView
    speed: Speed
    largest: int
    cap: int
    step_s: float = 0.0

    @property
    def rank_speed(self) -> RankSpeed:
        """Micro-batches spread their overhead over the samples when the slice has to be cut."""
        cut = self.speed.overhead_s / self.largest if self.largest < self.cap else 0.0
        fixed_s = self.speed.overhead_s + self.step_s + self.speed.optimizer_s
        return RankSpeed(fixed_s, self.speed.seconds_per_sample + cut, self.cap)

    def among(self, ranks: int, volume_bytes: float, gpu: bool) -> _Member:
        return replace(self, step_s=cost.group_step_s(ranks, volume_bytes, self.node.capacity, gpu=gpu))

    def compute_s(self, samples: int, micro_batches: int) -> float:
        return self.step_s + self.speed.compute_s(samples, micro_batches)


@dataclass(frozen=True, slots=True)
class DataParallel:
    name: StrategyName = StrategyName.DATA_PARALLEL

    def feasible(self, inputs: Inputs) -> tuple[str, ...]:
        return reasons_of(inputs.answer(self.name, _answer))

    def estimate(self, inputs: Inputs) -> PlacedEstimate:
        return placed_of(self.name, inputs.answer(self.name, _answer))

    def decompose(self, inputs: Inputs, placed: PlacedEstimate) -> tuple[PlannedSubtask, ...]:
        return train_subtasks(inputs, placed, "all_reduce")


def _answer(inputs: Inputs) -> Answer:
    if reasons := group_reasons(inputs):
        return reasons
    if inputs.spec.train.batch_size < 2:
        return ("a batch of one sample cannot be cut",)
    return _best(inputs) or _last_reasons(inputs)


def _last_reasons(inputs: Inputs) -> tuple[str, ...]:
    """Why no prefix of any group works although there are groups: memory, or a node too slow for a single sample."""
    grouped = {node.node_id: node for group in groups(inputs) for node in group.nodes}
    short = [node for node in grouped.values() if _member(inputs, node) is None]
    if short:
        return (memory_reason(inputs, short, RANKS),)
    if inputs.spec.train.accumulate != "auto":
        return ("the batch does not fit in memory with this train.accumulate: set it to auto",)
    return ("one node would get every sample: the others are too slow to help with this batch size",)


def _member(inputs: Inputs, node: NodeView) -> _Member | None:
    train = inputs.spec.train
    largest = largest_micro_batch(inputs.profile, train.optimizer, node, RANKS, train.batch_size)
    if largest == 0:
        return None
    cap = train.batch_size if train.accumulate == "auto" else min(train.batch_size, largest * train.accumulate)
    return _Member(node, cost.speed(inputs.profile, node.capacity, train), largest, cap)


def _best(inputs: Inputs) -> PlacedEstimate | None:
    """The fastest prefix of any group; None when there is none."""
    best: PlacedEstimate | None = None
    members = {node.node_id: _member(inputs, node) for node in inputs.eligible}
    holding = inputs.holding
    for group in close_groups(inputs):
        found = [member for node in group.nodes if (member := members[node.node_id]) for _ in range(ranks_of(node))]
        if holding and not any(member.node.node_id in holding for member in found):
            continue
        for placed in _prefixes(inputs, group.network, _in_order(inputs, found)):
            if best is None or placed.cost.seconds < best.cost.seconds:
                best = placed
    return best


def _in_order(inputs: Inputs, members: list[_Member]) -> list[_Member]:
    """A member per rank, fastest on the whole batch first; one that holds the newest state before all others."""
    batch = inputs.spec.train.batch_size
    ordered = sorted(members, key=lambda member: (member.speed.step_s(batch), member.node.name))
    holder = next((member for member in ordered if member.node.node_id in inputs.holders), None)
    return ordered if holder is None else [holder, *(member for member in ordered if member is not holder)]


def _prefixes(inputs: Inputs, network: str, ordered: list[_Member]) -> list[PlacedEstimate]:
    least_nodes, most_nodes = inputs.spec.nodes.min, inputs.spec.nodes.max
    batch = inputs.spec.train.batch_size
    # a person who names the strategy wants every node at work, also one that a split by speed would leave out
    least = 1 if inputs.spec.strategy == StrategyName.DATA_PARALLEL else 0
    answers = []
    worst = Link(0.0, math.inf)
    for count in range(2, len(ordered) + 1):
        joined = ordered[count - 1]
        for other in ordered[: count - 1]:
            link = link_between(inputs.cluster, joined.node, other.node)
            worst = Link(max(worst.rtt_s, link.rtt_s), min(worst.bytes_per_s, link.bytes_per_s))
        gpu = all_have_gpu(member.node for member in ordered[:count])
        prefix = [member.among(count, 4.0 * inputs.profile.parameters, gpu) for member in ordered[:count]]
        used = len({member.node.node_id for member in prefix})
        if used > most_nodes:
            break
        if used < least_nodes or sum(member.cap for member in prefix) < batch:
            continue
        if batch < least * count:
            continue
        samples = split_batch(alike([member.rank_speed for member in prefix], batch), batch, least)
        if min(samples) == 0:
            continue
        answers.append(_on(inputs, network, prefix, samples, worst))
    return answers


def _on(
    inputs: Inputs, network: str, members: Sequence[_Member], samples: tuple[int, ...], link: Link
) -> PlacedEstimate:
    """T = mix(max_i compute_i, AR(k, 4P / c) + codec; g) + optimizer, for the whole job with everything around it."""
    profile, data, train = inputs.profile, inputs.data, inputs.spec.train
    pieces = tuple(micro_batches(inputs, count, m.largest) for m, count in zip(members, samples, strict=True))
    shares = list(zip(members, samples, pieces, strict=True))
    compute_s = max(member.compute_s(count, micro) for member, count, micro in shares)
    optimizer_s = max(member.speed.optimizer_s for member in members)
    sync = cost.synchronise(
        len(members),
        profile.parameters,
        compute_s,
        link.rtt_s,
        link.bytes_per_s,
        inputs.spec.sync.compression,
        gpu=all_have_gpu(member.node for member in members),
    )
    network_s, sent = sync.network_s + sync.codec_s, sync.bytes / len(members)
    overlapped_s = max(
        cost.in_group_s(
            member.compute_s(count, micro),
            network_s,
            carrying_s(network, network_s, sent, 0, member.node),
            member.node.capacity,
            overlap_over(network),
        )
        for member, count, micro in shares
    )
    exposed_s, step_s = overlapped_s - compute_s, overlapped_s + optimizer_s
    startup_s = cost.startup_s(profile, [member.node.capacity for member in members])
    transfer_s = max(download_s(data.bytes, member.node) for member in members)
    evaluation_s = cost.evaluation_s(
        profile, train, data, [(member.speed, count / train.batch_size) for member, count, _ in shares]
    )
    steps = cost.assumed_steps(profile, train, data)
    memory = {
        member.node.node_id: worker_bytes(profile, train.optimizer, math.ceil(count / micro), len(members))
        for member, count, micro in shares
    }
    estimate = CostEstimate(
        seconds=startup_s + transfer_s + steps * step_s + evaluation_s,
        step_s=step_s,
        bytes_per_step=sync.bytes,
        memory_bytes=memory,
        terms={
            "compute": compute_s,
            "sync": exposed_s - min(sync.codec_s, exposed_s),
            "codec": min(sync.codec_s, exposed_s),
            "optimizer": optimizer_s,
            "startup": startup_s,
            "transfer": transfer_s,
            "evaluation": evaluation_s,
        },
        ranks=tuple(
            RankCost(
                member.node.node_id,
                member.compute_s(count, micro) + member.speed.optimizer_s,
                member.step_s + micro * member.speed.overhead_s,
                sync.bytes / len(members),
            )
            for member, count, micro in shares
        ),
    )
    placements = tuple(
        Placement(rank, m.node.node_id, count, replica=rank) for rank, (m, count, _) in enumerate(shares)
    )
    nodes = [member.node for member in members]
    return PlacedEstimate(
        estimate,
        placements,
        pieces,
        cost.steps_of(train, data),
        network,
        sync.compression,
        transfer_s,
        links=link_uses(ring_traffic(nodes, sync.bytes / len(members), sync.network_s)),
    )
