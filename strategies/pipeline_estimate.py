"""What one pipeline costs exactly: given the hosts of every stage, the cuts and the number of micro-batches.

Sizes each replica's share of the batch by the speed of its chain, checks the memory of every rank, adds up a step:
max over replicas of (sum c_s + sum p_s + (m - 1) max q_s), then the gradients of replicated stages and tied tensors,
then the optimizer. `weigh` says how long the job takes, None when a stage does not fit; `estimate` says all the rest of
the one that is kept. Invariant: every replica has a sample for each micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, slots=True, eq=False)
class Replica:
    """One host of every stage, and the links from each to the next."""

    units: tuple[Unit, ...]
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class _Passing:
    """One replica's step, and of it what the slowest stage computes and what filling and draining costs."""

    seconds: float
    busy_s: float
    bubble_s: float


@dataclass(frozen=True, slots=True)
class _Exchange:
    """Of a step: how long it takes, the bytes over all links, and where they go."""

    seconds: float
    bytes: float
    traffic: Traffic


@dataclass(frozen=True, slots=True, eq=False)
class Weighed:
    """`seconds` of the whole job, and what they are made of."""

    seconds: float
    shape: Shape
    replicas: tuple[Replica, ...]
    samples: tuple[int, ...]  # of each replica
    longest: _Passing
    gradients: _Exchange
    tied: _Exchange
    step_s: float
    terms: Mapping[str, float]


def load_of(inputs: Inputs, replicas: int, rows: float, micro_batches: int, schedule: Schedule) -> Load:
    bucket = GRADIENT_BYTES if replicas > 1 else 0
    return Load(micro_batches, rows, schedule, bytes_per_parameter(inputs.spec.train.optimizer) + bucket)


def weigh(inputs: Inputs, segments: Segments, shape: Shape) -> Weighed | None:
    profile, data, train = inputs.profile, inputs.data, inputs.spec.train
    replicas = _replicas(inputs, shape)
    samples = _shares(inputs, segments, shape, replicas)
    if samples is None:
        return None
    passings = [_passes(segments, shape, replica, count) for replica, count in zip(replicas, samples, strict=True)]
    longest = max(passings, key=lambda passing: passing.seconds)
    gradients = _gradients(inputs, segments, shape)
    tied = _tied(inputs, segments, shape, replicas)
    optimizer_s = max(
        cost.optimizer_s(float(segments.parameters[piece]), unit.node.capacity, train)
        for piece, slot in zip(shape.pieces, shape.slots, strict=True)
        for unit in slot
    )
    step_s = longest.seconds + gradients.seconds + tied.seconds + optimizer_s
    nodes = [unit.node for replica in replicas for unit in replica.units]
    startup_s = cost.startup_s(profile, [node.capacity for node in nodes], traced=True)
    wait_s = max(download_s(data.bytes, node) for node in nodes)
    elsewhere = sum(float(segments.parameters[piece]) for piece in shape.pieces[1:])
    delivery_s = collected_s(inputs.cluster, [unit.node for unit in replicas[0].units], 4.0 * elsewhere)
    batches = (data.test_rows or 0) / train.batch_size
    evaluation_s = (
        cost.evaluations(profile, train, data) * batches * longest.seconds * cost.EVALUATION_FACTOR
    ) / cost.TRAINING_FACTOR
    return Weighed(
        startup_s + wait_s + cost.assumed_steps(profile, train, data) * step_s + evaluation_s + delivery_s,
        shape,
        replicas,
        samples,
        longest,
        gradients,
        tied,
        step_s,
        {
            "compute": longest.busy_s,
            "bubble": longest.bubble_s,
            "sync": longest.seconds - longest.busy_s - longest.bubble_s + gradients.seconds + tied.seconds,
            "optimizer": optimizer_s,
            "startup": startup_s,
            "transfer": wait_s,
            "evaluation": evaluation_s,
            "delivery": delivery_s,
        },
    )


def estimate(inputs: Inputs, segments: Segments, network: str, weighed: Weighed) -> PlacedEstimate:
    profile, shape, tied = inputs.profile, weighed.shape, weighed.tied
    shares = list(zip(weighed.replicas, weighed.samples, strict=True))
    crossing = _crossing(segments, shape, shares)
    stages = tuple((segments.bounds[first], segments.bounds[last]) for first, last in shape.pieces)
    ranks = [
        (replica, stage, unit, count)
        for replica, (members, count) in enumerate(shares)
        for stage, unit in enumerate(members.units)
    ]
    return PlacedEstimate(
        CostEstimate(
            seconds=weighed.seconds,
            step_s=weighed.step_s,
            bytes_per_step=crossing.bytes + weighed.gradients.bytes + tied.bytes,
            memory_bytes=_memory(inputs, segments, shape, shares),
            terms=weighed.terms,
            ranks=tuple(_rank(inputs, segments, shape, stage, unit, count) for _, stage, unit, count in ranks),
        ),
        tuple(
            Placement(rank, unit.node.node_id, count, stage, replica)
            for rank, (replica, stage, unit, count) in enumerate(ranks)
        ),
        (shape.micro_batches,) * len(ranks),
        cost.steps_of(inputs.spec.train, inputs.data),
        network,
        transfer_s=weighed.terms["transfer"],
        layout=Layout(
            stages,
            tuple(profile.layers[last - 1].name for _, last in stages[:-1]),
            len(shares),
            shape.schedule,
        ),
        links=link_uses(crossing.traffic, weighed.gradients.traffic, tied.traffic),
    )


def _rank(inputs: Inputs, segments: Segments, shape: Shape, stage: int, unit: Unit, samples: int) -> RankCost:
    """What it sends: activations to the next stage, their gradients to the one before, its part of averages."""
    piece = shape.pieces[stage]
    passes = math.ceil(samples / math.ceil(samples / shape.micro_batches))
    overhead_s = passes * float(unit.host.compute_s(0.0, piece))
    work_s = samples * float(unit.host.seconds[piece])
    optimizer_s = cost.optimizer_s(float(segments.parameters[piece]), unit.node.capacity, inputs.spec.train)
    crossing = samples * float(segments.cut_bytes[piece[0]] + segments.cut_bytes[piece[1]])
    replicas = len(shape.slots[0])
    averaged = cost.all_reduce_bytes(replicas, 4.0 * float(segments.parameters[piece]), gpu=shape.gpu) / replicas
    lenders = [4.0 * float(segments.borrowed[each]) for each in (shape.pieces[1:] if stage == 0 else (piece,))]
    tied = sum(cost.all_reduce_bytes(2, volume, gpu=shape.gpu) / 2 for volume in lenders)
    node_id = unit.node.node_id
    return RankCost(node_id, overhead_s + work_s + optimizer_s, overhead_s, crossing + averaged + tied)


def _replicas(inputs: Inputs, shape: Shape) -> tuple[Replica, ...]:
    """One host of every slot each: the next stage of a replica is where the link to it is best."""
    chains: list[list[Unit]] = [[unit] for unit in shape.slots[0]]
    joined: list[list[Link]] = [[] for _ in chains]
    for slot in shape.slots[1:]:
        left = list(slot)
        for chain, taken in zip(chains, joined, strict=True):
            links = [link_between(inputs.cluster, chain[-1].node, unit.node) for unit in left]
            best = min(range(len(left)), key=lambda k: (-round(math.log2(links[k].bytes_per_s)), k))
            chain.append(left.pop(best))
            taken.append(links[best])
    return tuple(Replica(tuple(chain), tuple(links)) for chain, links in zip(chains, joined, strict=True))


def _shares(inputs: Inputs, segments: Segments, shape: Shape, replicas: tuple[Replica, ...]) -> tuple[int, ...] | None:
    """Samples of each replica by the speed of its chain and the memory of its stages; None when they do not fit."""
    batch, count = inputs.spec.train.batch_size, shape.micro_batches
    if batch < count * len(replicas):
        return None
    # in whole rows of every micro-batch where the batch allows it
    unit = count if batch % count == 0 else 1
    caps = [
        min(batch, min(math.ceil(batch / count), _most_rows(inputs, segments, shape, replica)) * count) // unit
        for replica in replicas
    ]
    if any(cap < count // unit for cap in caps) or sum(caps) < batch // unit:
        return None
    if len(replicas) == 1:
        return (batch,)  # nothing to share
    speeds = []
    for replica, cap in zip(replicas, caps, strict=True):
        empty, full = (_pass(segments, shape, replica, rows, count).seconds for rows in (0.0, batch / count))
        speeds.append(RankSpeed(empty, max((full - empty) * unit / batch, 1e-12), cap))
    return tuple(unit * share for share in split_batch(alike(speeds, batch // unit), batch // unit, count // unit))


def _most_rows(inputs: Inputs, segments: Segments, shape: Shape, replica: Replica) -> int:
    """Rows of a micro-batch that every stage of the chain has room for."""
    most = float(inputs.spec.train.batch_size)
    empty, one = (_load(inputs, shape, rows) for rows in (0.0, 1.0))
    for stage, unit in enumerate(replica.units):
        fixed = _stage_bytes(segments, shape, empty, stage)
        row = _stage_bytes(segments, shape, one, stage) - fixed
        if fixed > unit.host.budget_bytes:
            return 0
        most = min(most, (unit.host.budget_bytes - fixed) / max(row, 1e-9))
    return int(most)


def _load(inputs: Inputs, shape: Shape, rows: float) -> Load:
    return load_of(inputs, len(shape.slots[0]), rows, shape.micro_batches, shape.schedule)


def _stage_bytes(segments: Segments, shape: Shape, load: Load, stage: int) -> float:
    return float(stage_bytes(segments, load, len(shape.slots) - stage, shape.pieces[stage]))


def _passes(segments: Segments, shape: Shape, replica: Replica, samples: int) -> _Passing:
    """Full micro-batches, and a smaller one after them for what is left."""
    rows = math.ceil(samples / shape.micro_batches)
    first = _pass(segments, shape, replica, rows, samples // rows)
    if samples % rows == 0:
        return first
    rest = _pass(segments, shape, replica, samples % rows, 1)
    return _Passing(first.seconds + rest.seconds, first.busy_s + rest.busy_s, first.bubble_s + rest.bubble_s)


def _pass(segments: Segments, shape: Shape, replica: Replica, rows: float, micro_batches: int) -> _Passing:
    units = replica.units
    compute = [float(unit.host.compute_s(rows, piece)) for piece, unit in zip(shape.pieces, units, strict=True)]
    burst = [cost.burst_share(unit.node.capacity) * seconds for seconds, unit in zip(compute, units, strict=True)]
    sent = [
        transfer_s(link, rows * float(segments.cut_bytes[cut]))
        for link, cut in zip(replica.links, shape.cuts[1:-1], strict=True)
    ]
    # as cost.in_group_s: stages wait for each micro-batch
    spared_s = micro_batches * min(cost.kept_s(unit.node.capacity) for unit in units)
    waiting_s = _filled_s(compute, sent, micro_batches)
    seconds = max(_filled_s(burst, sent, micro_batches), waiting_s - spared_s, micro_batches * max(compute))
    bubble_s = min(sum(compute) - max(compute), seconds - micro_batches * max(compute))
    return _Passing(seconds, micro_batches * max(compute), bubble_s)


def _filled_s(compute: Sequence[float], sent: Sequence[float], micro_batches: int) -> float:
    """From the first micro-batch into the first stage to the last one out of it."""
    slowest_s = max(cost.mix(c, p) for c, p in zip(compute, [*sent, 0.0], strict=True))
    return sum(compute) + sum(sent) + (micro_batches - 1) * slowest_s


def _memory(
    inputs: Inputs, segments: Segments, shape: Shape, shares: Sequence[tuple[Replica, int]]
) -> dict[NodeId, int]:
    """Of the fullest rank of each node: with several GPUs each has its own memory."""
    found: dict[NodeId, int] = {}
    for replica, count in shares:
        load = _load(inputs, shape, math.ceil(count / shape.micro_batches))
        for stage, unit in enumerate(replica.units):
            need = int(_stage_bytes(segments, shape, load, stage))
            found[unit.node.node_id] = max(need, found.get(unit.node.node_id, 0))
    return found


def _crossing(segments: Segments, shape: Shape, shares: Sequence[tuple[Replica, int]]) -> _Exchange:
    """Activations and their gradients of a whole batch: of each link by itself."""
    total, traffic = 0.0, dict[tuple[NodeId, NodeId], tuple[float, float]]()
    for replica, count in shares:
        for (a, b), link, cut in zip(pairwise(replica.units), replica.links, shape.cuts[1:-1], strict=True):
            sent = 2 * count * float(segments.cut_bytes[cut])
            took_s = shape.micro_batches * link.rtt_s + sent / link.bytes_per_s
            add_traffic(traffic, a.node.node_id, b.node.node_id, sent, took_s)
            total += sent
    return _Exchange(0.0, total, traffic)


def _gradients(inputs: Inputs, segments: Segments, shape: Shape) -> _Exchange:
    """Stages average beside each other: the slowest counts."""
    replicas = len(shape.slots[0])
    if replicas < 2:
        return _Exchange(0.0, 0.0, {})
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
    return _Exchange(slowest_s, total, found)


def _tied(inputs: Inputs, segments: Segments, shape: Shape, replicas: Sequence[Replica]) -> _Exchange:
    """A tensor that two stages use: the first stage and the one that borrows it add up their gradients."""
    seconds, total = 0.0, 0.0
    found: dict[tuple[NodeId, NodeId], tuple[float, float]] = {}
    for first, *others in (replica.units for replica in replicas):
        chain_s = 0.0
        for piece, unit in zip(shape.pieces[1:], others, strict=True):
            volume = 4.0 * float(segments.borrowed[piece])
            if volume:
                link = link_between(inputs.cluster, first.node, unit.node)
                took_s = cost.all_reduce_s(2, volume, link.rtt_s, link.bytes_per_s, gpu=shape.gpu)
                sent = cost.all_reduce_bytes(2, volume, gpu=shape.gpu)
                add_traffic(found, first.node.node_id, unit.node.node_id, sent, took_s)
                chain_s, total = chain_s + took_s, total + sent
        seconds = max(seconds, chain_s)
    return _Exchange(seconds, total, found)
