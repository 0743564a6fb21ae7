"""What shards cost: every rank keeps 1/k of weights, gradients and optimizer state and gathers each block as it runs.

Shards are even, so a node with more memory runs several ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from protos.ids import NodeId
from protos.jobspec import StrategyName
from protos.plan import Layout, NodeView, RankCost
from strategies import cost
from strategies.base import Inputs, PlacedEstimate
from strategies.blocks import blocks_of, gathered_parameters
from strategies.heap import USUALLY_KEPT_TIMES, may_keep
from strategies.links import carrying_s, worst_link
from strategies.memory import budget_bytes, bytes_per_parameter, sample_bytes, shard_reserve_bytes
from strategies.partition import RankSpeed, alike, split_batch
from strategies.shared_model import Ranks, Step, placed, together

GATHERED_BYTES = 8  # for each parameter of a block that is whole: weight and gradient
MOST_RANKS_PER_NODE = 4
GATHER_S = 1.1e-3  # of a block's gathering and scattering in one pass, whatever its size: hooks and bookkeeping
FRESH_BYTES_PER_S = 4e9  # of memory just got from the system, on a whole core: gathered blocks come and go
GATHERED_FRESH_BYTES = 28  # per parameter and pass: twice what is gathered and its copy; gradient, sent, received


def virtual(inputs: Inputs, units: Sequence[NodeView], network: str) -> Ranks | None:
    """Ranks so that every node has room for its shards: as long as one is short, the roomiest node takes one more."""
    asked = inputs.options(StrategyName.MODEL_PARALLEL).ranks
    units = list(units)
    while True:
        ranks = Ranks(together(units), network)
        need = shard_bytes(inputs, ranks.count) + sample_bytes(inputs.profile)
        short = any(ranks.room(node) < need for node in ranks.nodes)
        if ranks.count >= (asked or 2) and (not short or asked is not None):
            return None if short or (asked is not None and ranks.count != asked) else ranks
        here = ranks.here
        after = shard_bytes(inputs, ranks.count + 1) + sample_bytes(inputs.profile)
        room = {
            node.node_id: budget_bytes(node) - (here[node.node_id] + 1) * after
            for node in ranks.nodes
            if not node.capacity.gpus and here[node.node_id] < MOST_RANKS_PER_NODE
        }
        roomiest = max(room, key=lambda node_id: room[node_id], default=None)
        if roomiest is None:
            return None
        units.append(next(node for node in units if node.node_id == roomiest))


def shard_bytes(inputs: Inputs, ranks: int) -> float:
    """Of one rank, without activations: its shard, the blocks that are whole for a moment, and what torch takes."""
    profile = inputs.profile
    shard = math.ceil(profile.parameters / ranks) * bytes_per_parameter(inputs.spec.train.optimizer)
    return shard + gathered_parameters(profile) * GATHERED_BYTES + shard_reserve_bytes()


def sharded(inputs: Inputs, ranks: Ranks) -> PlacedEstimate | None:
    profile, train, here = inputs.profile, inputs.spec.train, ranks.here
    fixed = shard_bytes(inputs, ranks.count)
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
    collectives = 3 * gathered * pieces
    passed_s = max(  # each collective waits for the one before
        cost.in_group_s(
            pass_s,
            network_s,
            carrying_s(ranks.network, network_s, sent, collectives, node),
            node.capacity,
            1.0,
            collectives,
        )
        for node, pass_s in zip(ranks.nodes, passes, strict=True)
    )
    return placed(
        inputs,
        ranks,
        samples,
        pieces,
        Layout(((0, len(profile.layers)),), sharded=True),
        Step(compute_s, passed_s, max(updates), network_s, sent),
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
