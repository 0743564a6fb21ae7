"""The model itself shared among nodes: its parameters cut into shards, or its single layers cut (tensor parallel).

Sharded: every rank keeps 1/k of weights, gradients and optimizer state and gathers each block while it runs, so a model
larger than any node trains; shards are even, so a node with more memory runs several ranks. Where every node holds the
whole model it is left out unless the job file names it: data_parallel does the same work and sends less. Tensor: every
rank computes a part of each linear layer on the whole batch; only for very short round trips. The faster is the plan.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from protos.ids import NodeId
from protos.jobspec import StrategyName
from protos.plan import CostEstimate, Layout, NodeView, Placement, PlannedSubtask, RankCost
from strategies import cost
from strategies.base import Answer, Inputs, PlacedEstimate, gib, placed_of, reasons_of, train_subtasks
from strategies.blocks import blocks_of, gathered_parameters
from strategies.grouping import close_groups, group_reasons, groups
from strategies.heap import USUALLY_KEPT_TIMES, may_keep
from strategies.links import download_s, link_uses, ranks_of, ring_traffic, worst_link
from strategies.memory import (
    SHARE,
    budget_bytes,
    bytes_per_parameter,
    largest_micro_batch,
    sample_bytes,
    shard_reserve_bytes,
)
from strategies.partition import RankSpeed, alike, split_batch

SHARDED, TENSOR = "sharded", "tensor"
GATHERED_BYTES = 8  # for each parameter of a block that is whole: weight and gradient
MOST_RANKS_PER_NODE = 4
TENSOR_RTT_S = 0.001  # above, waiting for the parts of every layer excludes it
GATHER_S = 1.1e-3  # of a block's gathering and scattering in one pass, whatever its size: hooks and bookkeeping
FRESH_BYTES_PER_S = 4e9  # of memory just got from the system, on a whole core: gathered blocks come and go
GATHERED_FRESH_BYTES = 28  # per parameter and pass: twice what is gathered and its copy; gradient, sent, received
LAYER_S = 3e-4  # of a layer that is cut, in one pass: what its distributed tensors cost to handle


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


@dataclass(frozen=True, slots=True)
class _Ranks:
    """One entry per rank, those of one node next to each other; `room` is what each has of its node's memory."""

    nodes: tuple[NodeView, ...]
    network: str

    @property
    def count(self) -> int:
        return len(self.nodes)

    @property
    def here(self) -> Counter[NodeId]:
        return Counter(node.node_id for node in self.nodes)

    def room(self, node: NodeView) -> float:
        """Of one rank: a GPU has its own memory, ranks of a node without one share it."""
        return budget_bytes(node.capacity) / (1 if node.capacity.gpus else self.here[node.node_id])


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
    needed = inputs.spec.strategy != "auto" or not _whole_everywhere(inputs)
    tensor = asked.kind != SHARDED and needed and not _why_no_tensor(inputs)
    shards = asked.kind != TENSOR and needed
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
            ranks = _virtual(inputs, units[:count], group.network) if shards else None
            sharded = None if ranks is None else _sharded(inputs, ranks)
            if sharded is not None:
                yield sharded
            even = count in inputs.profile.tensor_ranks
            cut = _tensor(inputs, _Ranks(_together(units[:count]), group.network)) if tensor and even else None
            if cut is not None:
                yield cut


def _whole_everywhere(inputs: Inputs) -> bool:
    optimizer = inputs.spec.train.optimizer
    nodes = [node for group in groups(inputs) for node in group.nodes]
    return all(largest_micro_batch(inputs.profile, optimizer, node.capacity, 2, 1) for node in nodes)


def _together(units: Sequence[NodeView]) -> tuple[NodeView, ...]:
    counts = Counter(node.node_id for node in units)
    first = {node.node_id: node for node in units}
    return tuple(node for node_id, node in first.items() for _ in range(counts[node_id]))


def _virtual(inputs: Inputs, units: Sequence[NodeView], network: str) -> _Ranks | None:
    """Ranks so that every node has room for its shards: as long as one is short, the roomiest node takes one more."""
    asked = inputs.options(StrategyName.MODEL_PARALLEL).ranks
    units = list(units)
    while True:
        ranks = _Ranks(_together(units), network)
        need = _shard_bytes(inputs, ranks.count) + sample_bytes(inputs.profile)
        short = any(ranks.room(node) < need for node in ranks.nodes)
        if ranks.count >= (asked or 2) and (not short or asked is not None):
            return None if short or (asked is not None and ranks.count != asked) else ranks
        here = ranks.here
        after = _shard_bytes(inputs, ranks.count + 1) + sample_bytes(inputs.profile)
        room = {
            node.node_id: budget_bytes(node.capacity) - (here[node.node_id] + 1) * after
            for node in ranks.nodes
            if not node.capacity.gpus and here[node.node_id] < MOST_RANKS_PER_NODE
        }
        roomiest = max(room, key=lambda node_id: room[node_id], default=None)
        if roomiest is None:
            return None
        units.append(next(node for node in units if node.node_id == roomiest))


def _shard_bytes(inputs: Inputs, ranks: int) -> float:
    """Of one rank, without activations: its shard, the blocks that are whole for a moment, and what torch takes."""
    profile = inputs.profile
    shard = math.ceil(profile.parameters / ranks) * bytes_per_parameter(inputs.spec.train.optimizer)
    return shard + gathered_parameters(profile) * GATHERED_BYTES + shard_reserve_bytes()


def _sharded(inputs: Inputs, ranks: _Ranks) -> PlacedEstimate | None:
    profile, train, here = inputs.profile, inputs.spec.train, ranks.here
    fixed = _shard_bytes(inputs, ranks.count)
    largest = [int((ranks.room(node) - fixed) / max(sample_bytes(profile), 1e-9)) for node in ranks.nodes]
    speeds = [cost.speed(profile, node.capacity, train) for node in ranks.nodes]
    # ranks of a node without a GPU share its cores
    slower = [1 if node.capacity.gpus else here[node.node_id] for node in ranks.nodes]
    found = _split(inputs, speeds, slower, largest)
    if found is None:
        return None
    samples, pieces = found
    blocks, root = blocks_of(profile)
    gathered = len(blocks) + bool(root)
    overheads = [
        pieces * (speed.overhead_s + _gathering_s(node, gathered, profile.parameters))
        for node, speed in zip(ranks.nodes, speeds, strict=True)
    ]
    passes = [
        overhead_s + factor * count * (speed.seconds_per_sample + _fresh_s(node, 2 * sample_bytes(profile)))
        for node, overhead_s, speed, factor, count in zip(ranks.nodes, overheads, speeds, slower, samples, strict=True)
    ]
    compute_s = max(passes)
    link = worst_link(inputs.cluster, ranks.nodes)
    share = (ranks.count - 1) / ranks.count * 4.0 * profile.parameters
    handing_s = max(cost.stretched_s(cost.COLLECTIVE_S, node.capacity) for node in ranks.nodes)
    waits = 3 * gathered * ((ranks.count - 1) * link.rtt_s / 2 + handing_s)
    network_s = pieces * (3 * share / link.bytes_per_s + waits)
    updates = [
        factor * cost.optimizer_s(profile.parameters / ranks.count, node.capacity, train)
        for factor, node in zip(slower, ranks.nodes, strict=True)
    ]
    memory: Counter[NodeId] = Counter()
    for node, count in zip(ranks.nodes, samples, strict=True):
        need = int(fixed + math.ceil(count / pieces) * sample_bytes(profile) + _kept_bytes(node, profile.parameters))
        memory[node.node_id] = max(need, memory[node.node_id]) if node.capacity.gpus else need + memory[node.node_id]
    sent = 3 * pieces * share
    return _placed(
        inputs,
        ranks,
        samples,
        pieces,
        Layout(((0, len(profile.layers)),), sharded=True),
        _Step(compute_s, compute_s + network_s, max(updates), network_s, sent),  # each waits for the one before
        [
            RankCost(node.node_id, pass_s + update_s, overhead_s, sent)
            for node, pass_s, update_s, overhead_s in zip(ranks.nodes, passes, updates, overheads, strict=True)
        ],
        memory,
    )


def _kept_bytes(node: NodeView, parameters: int) -> float:
    """Gathered weights that stay with the heap where there is room for that; a plan never counts on having it."""
    weights = 4.0 * parameters
    if node.capacity.gpus or not may_keep(weights, node.capacity.memory_bytes):
        return 0.0
    return USUALLY_KEPT_TIMES * weights


def _gathering_s(node: NodeView, blocks: int, parameters: int) -> float:
    """Of one pass beside its arithmetic and the network."""
    return cost.stretched_s(blocks * GATHER_S, node.capacity) + _fresh_s(node, GATHERED_FRESH_BYTES * parameters)


def _fresh_s(node: NodeView, size_bytes: float) -> float:
    """Page faults of what a pass gets and gives back; a GPU's allocator keeps it."""
    return 0.0 if node.capacity.gpus else cost.stretched_s(size_bytes / FRESH_BYTES_PER_S, node.capacity)


def _split(
    inputs: Inputs, speeds: Sequence[cost.Speed], slower: Sequence[int], largest: Sequence[int]
) -> tuple[tuple[int, ...], int] | None:
    """Samples of each rank and into how many pieces all of them cut theirs: ranks gather together, so in step."""
    batch, accumulate = inputs.spec.train.batch_size, inputs.spec.train.accumulate
    pieces = 1 if accumulate == "auto" else accumulate
    while min(largest) > 0 and batch >= pieces * len(speeds):
        ranks = [
            RankSpeed(pieces * speed.overhead_s, factor * speed.seconds_per_sample, min(batch, rows * pieces))
            for speed, factor, rows in zip(speeds, slower, largest, strict=True)
        ]
        if sum(rank.cap for rank in ranks) >= batch:
            return split_batch(alike(ranks, batch), batch, pieces), pieces
        if accumulate != "auto":
            return None
        pieces += 1
    return None


@dataclass(frozen=True, slots=True)
class _Step:
    compute_s: float
    passed_s: float  # compute with the network
    optimizer_s: float
    network_s: float
    sent_bytes: float  # by each rank


def _placed(
    inputs: Inputs,
    ranks: _Ranks,
    samples: tuple[int, ...],
    pieces: int,
    layout: Layout,
    step: _Step,
    costs: Sequence[RankCost],
    memory: Counter[NodeId],
) -> PlacedEstimate:
    profile, data, train = inputs.profile, inputs.data, inputs.spec.train
    startup_s = cost.startup_s(ranks.count)
    transfer_s = max(download_s(data.bytes, node) for node in ranks.nodes)
    batches = (data.test_rows or 0) / train.batch_size
    forward_s = step.passed_s * cost.EVALUATION_FACTOR / cost.TRAINING_FACTOR
    evaluation_s = cost.evaluations(profile, train, data) * batches * forward_s
    step_s = step.passed_s + step.optimizer_s
    estimate = CostEstimate(
        seconds=startup_s + transfer_s + cost.assumed_steps(profile, train, data) * step_s + evaluation_s,
        step_s=step_s,
        bytes_per_step=ranks.count * step.sent_bytes,
        memory_bytes=dict(memory),
        terms={
            "compute": step.compute_s,
            "sync": step.passed_s - step.compute_s,
            "optimizer": step.optimizer_s,
            "startup": startup_s,
            "transfer": transfer_s,
            "evaluation": evaluation_s,
        },
        ranks=tuple(costs),
    )
    placements = tuple(
        Placement(rank, node.node_id, count, replica=layout.replica_of(rank))
        for rank, (node, count) in enumerate(zip(ranks.nodes, samples, strict=True))
    )
    links = link_uses(ring_traffic(ranks.nodes, step.sent_bytes, step.network_s))
    steps, counts = cost.steps_of(train, data), (pieces,) * ranks.count
    return PlacedEstimate(
        estimate, placements, counts, steps, ranks.network, transfer_s=transfer_s, layout=layout, links=links
    )


def _why_no_tensor(inputs: Inputs) -> str:
    profile = inputs.profile
    return f"tensor parallel: {profile.why_not_tensor}" if profile.why_not_tensor else ""


def _tensor(inputs: Inputs, ranks: _Ranks) -> PlacedEstimate | None:
    """None where the links are too slow or a rank has no room for one sample."""
    profile, train, count = inputs.profile, inputs.spec.train, ranks.count
    link = worst_link(inputs.cluster, ranks.nodes)
    if link.rtt_s > TENSOR_RTT_S:
        return None
    cut = [layer for layer in profile.layers if "linear" in layer.kind.lower()]
    held = profile.parameters - sum(layer.parameters for layer in cut) * (1 - 1 / count)
    fixed = held * bytes_per_parameter(train.optimizer) + shard_reserve_bytes()
    rows = min(int((ranks.room(node) - fixed) / max(sample_bytes(profile), 1e-9)) for node in ranks.nodes)
    if rows < 1:
        return None
    pieces = math.ceil(train.batch_size / rows) if train.accumulate == "auto" else train.accumulate
    if math.ceil(train.batch_size / pieces) > rows:
        return None
    compute_s = optimizer_s = 0.0
    costs = []
    for node in ranks.nodes:
        per_layer = cost.layer_seconds(profile, node.capacity)
        sample_s = sum(
            seconds / count if "linear" in layer.kind.lower() else seconds
            for layer, seconds in zip(profile.layers, per_layer, strict=True)
        )
        overhead_s = cost.speed(profile, node.capacity, train).overhead_s
        overhead_s += cost.stretched_s(len(cut) * LAYER_S, node.capacity)
        pass_s, update_s = (
            pieces * overhead_s + sample_s * train.batch_size,
            cost.optimizer_s(held, node.capacity, train),
        )
        compute_s, optimizer_s = max(compute_s, pass_s), max(optimizer_s, update_s)
        costs.append(RankCost(node.node_id, pass_s + update_s, pieces * overhead_s, 0.0))
    network_s, sent = 0.0, 0.0
    handing_s = max(cost.stretched_s(cost.COLLECTIVE_S, node.capacity) for node in ranks.nodes)
    blocks, root = blocks_of(profile)
    for layers, output_bytes in [
        *((block.layers, block.output_bytes) for block in blocks),
        *(((layer,), layer.output_bytes_per_sample) for layer in root),
    ]:
        linear = sum("linear" in layer.kind.lower() for layer in layers)
        times = 2 * math.ceil(linear / 2)  # a pair of layers, cut by columns then rows: once forward, once backward
        volume = train.batch_size * output_bytes
        network_s += times * pieces * cost.all_reduce_s(count, volume / pieces, link.rtt_s, link.bytes_per_s)
        network_s += times * pieces * handing_s
        sent += times * cost.all_reduce_bytes(count, volume) / count
    memory = Counter[NodeId]()
    for node in ranks.nodes:
        memory[node.node_id] = int(fixed + math.ceil(train.batch_size / pieces) * sample_bytes(profile))
    return _placed(
        inputs,
        ranks,
        (train.batch_size,) * count,
        pieces,
        Layout(((0, len(profile.layers)),), tensor=count),
        _Step(compute_s, compute_s + network_s, optimizer_s, network_s, sent),
        [replace(rank, sent_bytes=sent) for rank in costs],
        memory,
    )


def _last_reasons(inputs: Inputs) -> tuple[str, ...]:
    asked = inputs.options(StrategyName.MODEL_PARALLEL)
    nodes = max(
        (group.nodes for group in groups(inputs)), key=lambda group: sum(b.capacity.memory_bytes for b in group)
    )
    if asked.kind == TENSOR:
        if why := _why_no_tensor(inputs):
            return (why,)
        if asked.ranks is not None and asked.ranks not in inputs.profile.tensor_ranks:
            able = ", ".join(map(str, inputs.profile.tensor_ranks))
            return (f"tensor parallel: no layer can be cut among {asked.ranks} ranks; among {able} it can",)
        link = worst_link(inputs.cluster, nodes)
        if link.rtt_s > TENSOR_RTT_S:
            return (
                f"tensor parallel: a round trip of {1000 * link.rtt_s:.1f} ms is over {1000 * TENSOR_RTT_S:.0f} ms",
            )
        return ("tensor parallel: what is not cut (embeddings, activations of one sample) fits no node",)
    if inputs.spec.strategy == "auto" and _whole_everywhere(inputs):
        return ("every node holds the whole model: data_parallel does the same work and sends less",)
    ranks = asked.ranks or _most_ranks(nodes)
    if inputs.spec.train.batch_size < (asked.ranks or 2):
        return (f"a batch of {inputs.spec.train.batch_size} samples has none for each of {asked.ranks or 2} ranks",)
    need = _shard_bytes(inputs, ranks) + sample_bytes(inputs.profile)
    roomiest = max(nodes, key=lambda node: budget_bytes(node.capacity))
    return (
        f"needs {gib(need)} for each of {ranks} shards and one sample, {SHARE:.0%} of what {roomiest.name} grants is "
        f"{gib(budget_bytes(roomiest.capacity))}",
    )
