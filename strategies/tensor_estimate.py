"""What parts of layers cost (tensor parallel): every rank computes a part of each linear layer on the whole batch, and
waits for the others in each.

Takes every linear layer as cut and paired; strategies/tensor_plan_torch.py may see it otherwise (docs/status.md).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from protos.ids import NodeId
from protos.plan import Layout, RankCost
from strategies import cost
from strategies.base import Inputs, PlacedEstimate
from strategies.blocks import blocks_of
from strategies.links import worst_link
from strategies.memory import bytes_per_parameter, sample_bytes, shard_reserve_bytes
from strategies.shared_model import Ranks, Step, placed

TENSOR_RTT_S = 0.001  # above, waiting for the parts of every layer excludes it
LAYER_S = 3e-4  # of a layer that is cut, in one pass: what its distributed tensors cost to handle


def tensor(inputs: Inputs, ranks: Ranks) -> PlacedEstimate | None:
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
    return placed(
        inputs,
        ranks,
        (train.batch_size,) * count,
        pieces,
        Layout(((0, len(profile.layers)),), tensor=count),
        Step(compute_s, compute_s + network_s, optimizer_s, network_s, sent),
        [replace(rank, sent_bytes=sent) for rank in costs],
        memory,
    )
