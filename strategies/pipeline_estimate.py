"""What one pipeline costs exactly: given the hosts of every stage, the cuts and the number of micro-batches.

Sizes each replica's share of the batch by the speed of its chain, checks the memory of every rank, adds up a step:
max over replicas of (sum c_s + sum p_s + (m - 1) max q_s), then the gradients of replicated stages and tied tensors,
then the optimizer. Returns None when a stage does not fit. Invariant: every replica has a sample for each micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from protos.ids import NodeId
from protos.plan import CostEstimate, Layout, NodeView, Placement, RankCost, Schedule
from strategies import cost
from strategies.base import Inputs, PlacedEstimate
from strategies.links import (
    Link,
    Traffic,
    add_traffic,
    all_have_gpu,
    collected_s,
    download_s,
    link_between,
    link_uses,
    ring_traffic,
    worst_link,
)
from strategies.memory import GRADIENT_BYTES, bytes_per_parameter
from strategies.partition import RankSpeed, alike, split_batch
from strategies.segments import Load, Segments, stage_bytes
from strategies.stages import Host, transfer_s


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """One rank's place: a node, or one of its GPUs."""

    node: NodeView
    host: Host

    @property
    def speed(self) -> float:
        """Seconds of one sample through the whole model."""
        return float(self.host.compute_s(1.0)[0, -1])


@dataclass(frozen=True, slots=True)
class Shape:
    """`slots[s]`: the hosts of stage s, one per replica; stage s is of pieces [cuts[s], cuts[s + 1])."""

    slots: tuple[tuple[Unit, ...], ...]
    cuts: tuple[int, ...]
    micro_batches: int
    schedule: Schedule

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        return tuple(pairwise(self.cuts))

    @property
    def gpu(self) -> bool:
        """Whether every rank has one."""
        return all_have_gpu(unit.node for slot in self.slots for unit in slot)


@dataclass(frozen=True, slots=True)
class _Passing:
    """One replica's step, and of it what the slowest stage computes and what filling and draining costs."""

    seconds: float
    busy_s: float
    bubble_s: float


def load_of(inputs: Inputs, replicas: int, rows: float, micro_batches: int, schedule: Schedule) -> Load:
    bucket = GRADIENT_BYTES if replicas > 1 else 0
    return Load(micro_batches, rows, schedule, bytes_per_parameter(inputs.spec.train.optimizer) + bucket)


def weigh(inputs: Inputs, segments: Segments, network: str, shape: Shape) -> PlacedEstimate | None:
    profile, data, train = inputs.profile, inputs.data, inputs.spec.train
    chains = _replicas(inputs, shape)
    samples = _shares(inputs, segments, shape, chains)
    if samples is None:
        return None
    passings = [_passes(inputs, segments, shape, chain, count) for chain, count in zip(chains, samples, strict=True)]
    longest = max(passings, key=lambda passing: passing.seconds)
    sync_s, sync_bytes, sync_traffic = _gradients(inputs, segments, shape)
    tied_s, tied_bytes, tied_traffic = _tied(inputs, segments, shape, chains)
    optimizer_s = max(
        cost.optimizer_s(float(segments.parameters[piece]), unit.node.capacity, train)
        for piece, slot in zip(shape.pieces, shape.slots, strict=True)
        for unit in slot
    )
    step_s = longest.seconds + sync_s + tied_s + optimizer_s
    ranks = [unit for chain in chains for unit in chain]
    startup_s = cost.startup_s(profile, [unit.node.capacity for unit in ranks], traced=True)
    wait_s = max(download_s(data.bytes, unit.node) for unit in ranks)
    elsewhere = sum(float(segments.parameters[piece]) for piece in shape.pieces[1:])
    delivery_s = collected_s(inputs.cluster, [unit.node for unit in chains[0]], 4.0 * elsewhere)
    batches = (data.test_rows or 0) / train.batch_size
    evaluation_s = (
        cost.evaluations(profile, train, data) * batches * longest.seconds * cost.EVALUATION_FACTOR
    ) / cost.TRAINING_FACTOR
    crossing, crossing_traffic = _crossing(inputs, segments, shape, chains, samples)
    estimate = CostEstimate(
        seconds=startup_s + wait_s + cost.assumed_steps(profile, train, data) * step_s + evaluation_s + delivery_s,
        step_s=step_s,
        bytes_per_step=crossing + sync_bytes + tied_bytes,
        memory_bytes=_memory(inputs, segments, shape, chains, samples),
        terms={
            "compute": longest.busy_s,
            "bubble": longest.bubble_s,
            "sync": longest.seconds - longest.busy_s - longest.bubble_s + sync_s + tied_s,
            "optimizer": optimizer_s,
            "startup": startup_s,
            "transfer": wait_s,
            "evaluation": evaluation_s,
            "delivery": delivery_s,
        },
        ranks=tuple(
            _rank(inputs, segments, shape, stage, unit, count)
            for chain, count in zip(chains, samples, strict=True)
            for stage, unit in enumerate(chain)
        ),
    )
    stages = tuple((segments.bounds[first], segments.bounds[last]) for first, last in shape.pieces)
    return PlacedEstimate(
        estimate,
        tuple(
            Placement(replica * len(stages) + stage, unit.node.node_id, count, stage, replica)
            for replica, (chain, count) in enumerate(zip(chains, samples, strict=True))
            for stage, unit in enumerate(chain)
        ),
        (shape.micro_batches,) * len(ranks),
        cost.steps_of(train, data),
        network,
        transfer_s=wait_s,
        layout=Layout(
            stages,
            tuple(profile.layers[last - 1].name for _, last in stages[:-1]),
            len(chains),
            shape.schedule,
        ),
        links=link_uses(crossing_traffic, sync_traffic, tied_traffic),
    )


def _rank(inputs: Inputs, segments: Segments, shape: Shape, stage: int, unit: Unit, samples: int) -> RankCost:
    """What it sends: activations to the next stage, their gradients to the one before, its part of averages."""
    piece = shape.pieces[stage]
    passes = math.ceil(samples / math.ceil(samples / shape.micro_batches))
    overhead_s = passes * float(unit.host.compute_s(0.0)[piece])
    work_s = samples * float(unit.host.seconds[piece])
    optimizer_s = cost.optimizer_s(float(segments.parameters[piece]), unit.node.capacity, inputs.spec.train)
    crossing = samples * float(segments.cut_bytes[piece[0]] + segments.cut_bytes[piece[1]])
    replicas = len(shape.slots[0])
    averaged = cost.all_reduce_bytes(replicas, 4.0 * float(segments.parameters[piece]), gpu=shape.gpu) / replicas
    lenders = [4.0 * float(segments.borrowed[each]) for each in (shape.pieces[1:] if stage == 0 else (piece,))]
    tied = sum(cost.all_reduce_bytes(2, volume, gpu=shape.gpu) / 2 for volume in lenders)
    node_id = unit.node.node_id
    return RankCost(node_id, overhead_s + work_s + optimizer_s, overhead_s, crossing + averaged + tied)


def _replicas(inputs: Inputs, shape: Shape) -> list[tuple[Unit, ...]]:
    """One host of every slot each: the next stage of a replica is where the link to it is best."""
    chains: list[list[Unit]] = [[unit] for unit in shape.slots[0]]
    for slot in shape.slots[1:]:
        left = list(slot)
        for chain in chains:
            links = [link_between(inputs.cluster, chain[-1].node, unit.node) for unit in left]
            best = min(range(len(left)), key=lambda k: (-round(math.log2(links[k].bytes_per_s)), k))
            chain.append(left.pop(best))
    return [tuple(chain) for chain in chains]


def _shares(inputs: Inputs, segments: Segments, shape: Shape, chains: list[tuple[Unit, ...]]) -> tuple[int, ...] | None:
    """Samples of each replica by the speed of its chain and the memory of its stages; None when they do not fit."""
    batch, count = inputs.spec.train.batch_size, shape.micro_batches
    if batch < count * len(chains):
        return None
    # in whole rows of every micro-batch where the batch allows it
    unit = count if batch % count == 0 else 1
    speeds = []
    for chain in chains:
        empty, full = (_pass(inputs, segments, shape, chain, rows, count).seconds for rows in (0.0, batch / count))
        rows = min(math.ceil(batch / count), _most_rows(inputs, segments, shape, chain))
        speeds.append(RankSpeed(empty, max((full - empty) * unit / batch, 1e-12), min(batch, rows * count) // unit))
    if any(speed.cap < count // unit for speed in speeds) or sum(speed.cap for speed in speeds) < batch // unit:
        return None
    return tuple(unit * share for share in split_batch(alike(speeds, batch // unit), batch // unit, count // unit))


def _most_rows(inputs: Inputs, segments: Segments, shape: Shape, chain: tuple[Unit, ...]) -> int:
    """Rows of a micro-batch that every stage of the chain has room for."""
    most = float(inputs.spec.train.batch_size)
    for stage, (piece, unit) in enumerate(zip(shape.pieces, chain, strict=True)):
        fixed = _stage_bytes(inputs, segments, shape, stage, piece, 0.0)
        row = _stage_bytes(inputs, segments, shape, stage, piece, 1.0) - fixed
        if fixed > unit.host.budget_bytes:
            return 0
        most = min(most, (unit.host.budget_bytes - fixed) / max(row, 1e-9))
    return int(most)


def _stage_bytes(
    inputs: Inputs, segments: Segments, shape: Shape, stage: int, piece: tuple[int, int], rows: float
) -> float:
    load = load_of(inputs, len(shape.slots[0]), rows, shape.micro_batches, shape.schedule)
    return float(stage_bytes(segments, load, len(shape.slots) - stage)[piece])


def _passes(inputs: Inputs, segments: Segments, shape: Shape, chain: tuple[Unit, ...], samples: int) -> _Passing:
    """Full micro-batches, and a smaller one after them for what is left."""
    rows = math.ceil(samples / shape.micro_batches)
    first = _pass(inputs, segments, shape, chain, rows, samples // rows)
    if samples % rows == 0:
        return first
    rest = _pass(inputs, segments, shape, chain, samples % rows, 1)
    return _Passing(first.seconds + rest.seconds, first.busy_s + rest.busy_s, first.bubble_s + rest.bubble_s)


def _pass(
    inputs: Inputs, segments: Segments, shape: Shape, chain: tuple[Unit, ...], rows: float, micro_batches: int
) -> _Passing:
    compute = [float(unit.host.compute_s(rows)[piece]) for piece, unit in zip(shape.pieces, chain, strict=True)]
    burst = [cost.burst_share(unit.node.capacity) * seconds for seconds, unit in zip(compute, chain, strict=True)]
    sent = [
        transfer_s(link_between(inputs.cluster, a.node, b.node), rows * float(segments.cut_bytes[cut]))
        for (a, b), cut in zip(pairwise(chain), shape.cuts[1:], strict=False)
    ]
    # as cost.in_group_s: stages wait for each micro-batch
    spared_s = micro_batches * min(cost.kept_s(unit.node.capacity) for unit in chain)
    waiting_s = _filled_s(compute, sent, micro_batches)
    seconds = max(_filled_s(burst, sent, micro_batches), waiting_s - spared_s, micro_batches * max(compute))
    bubble_s = min(sum(compute) - max(compute), seconds - micro_batches * max(compute))
    return _Passing(seconds, micro_batches * max(compute), bubble_s)


def _filled_s(compute: Sequence[float], sent: Sequence[float], micro_batches: int) -> float:
    """From the first micro-batch into the first stage to the last one out of it."""
    slowest_s = max(cost.mix(c, p) for c, p in zip(compute, [*sent, 0.0], strict=True))
    return sum(compute) + sum(sent) + (micro_batches - 1) * slowest_s


def _memory(
    inputs: Inputs, segments: Segments, shape: Shape, chains: list[tuple[Unit, ...]], samples: tuple[int, ...]
) -> dict[NodeId, int]:
    """Of the fullest rank of each node: with several GPUs each has its own memory."""
    found: dict[NodeId, int] = {}
    for chain, count in zip(chains, samples, strict=True):
        rows = math.ceil(count / shape.micro_batches)
        for stage, (piece, unit) in enumerate(zip(shape.pieces, chain, strict=True)):
            need = int(_stage_bytes(inputs, segments, shape, stage, piece, rows))
            found[unit.node.node_id] = max(need, found.get(unit.node.node_id, 0))
    return found


def _crossing(
    inputs: Inputs, segments: Segments, shape: Shape, chains: list[tuple[Unit, ...]], samples: tuple[int, ...]
) -> tuple[float, Traffic]:
    """Activations and their gradients of a whole batch."""
    total, traffic = 0.0, dict[tuple[NodeId, NodeId], tuple[float, float]]()
    for chain, count in zip(chains, samples, strict=True):
        for (a, b), cut in zip(pairwise(chain), shape.cuts[1:], strict=False):
            sent = 2 * count * float(segments.cut_bytes[cut])
            link = link_between(inputs.cluster, a.node, b.node)
            took_s = shape.micro_batches * link.rtt_s + sent / link.bytes_per_s
            add_traffic(traffic, a.node.node_id, b.node.node_id, sent, took_s)
            total += sent
    return total, traffic


def _gradients(inputs: Inputs, segments: Segments, shape: Shape) -> tuple[float, float, Traffic]:
    """Stages average beside each other: the slowest counts. Also the bytes and where they go."""
    replicas = len(shape.slots[0])
    if replicas < 2:
        return 0.0, 0.0, {}
    slowest_s, total = 0.0, 0.0
    found: dict[tuple[NodeId, NodeId], tuple[float, float]] = {}
    for piece, slot in zip(shape.pieces, shape.slots, strict=True):
        nodes = [unit.node for unit in slot]
        link: Link = worst_link(inputs.cluster, nodes)
        volume = 4.0 * float(segments.parameters[piece])
        took_s = cost.all_reduce_s(replicas, volume, link.rtt_s, link.bytes_per_s, gpu=shape.gpu)
        moved = cost.all_reduce_bytes(replicas, volume, gpu=shape.gpu)
        slowest_s, total = max(slowest_s, took_s), total + moved
        for (a, b), (sent, seconds) in ring_traffic(nodes, moved / replicas, took_s).items():
            add_traffic(found, a, b, sent, seconds)
    return slowest_s, total, found


def _tied(
    inputs: Inputs, segments: Segments, shape: Shape, chains: list[tuple[Unit, ...]]
) -> tuple[float, float, Traffic]:
    """A tensor that two stages use: the first stage and the one that borrows it add up their gradients."""
    seconds, total = 0.0, 0.0
    found: dict[tuple[NodeId, NodeId], tuple[float, float]] = {}
    for chain in chains:
        chain_s = 0.0
        for piece, unit in list(zip(shape.pieces, chain, strict=True))[1:]:
            volume = 4.0 * float(segments.borrowed[piece])
            if volume:
                link = link_between(inputs.cluster, chain[0].node, unit.node)
                took_s = cost.all_reduce_s(2, volume, link.rtt_s, link.bytes_per_s, gpu=shape.gpu)
                sent = cost.all_reduce_bytes(2, volume, gpu=shape.gpu)
                add_traffic(found, chain[0].node.node_id, unit.node.node_id, sent, took_s)
                chain_s, total = chain_s + took_s, total + sent
        seconds = max(seconds, chain_s)
    return seconds, total, found
