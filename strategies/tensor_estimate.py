"""What parts of layers cost (tensor parallel): every rank computes a part of each large layer on the whole batch, and
waits for the others in each.

Which layers are cut and which collectives they need is not guessed here: identification derived the plan of the run and
says what it comes to (protos.model.TensorCut).
"""

from __future__ import annotations

import math
from collections import Counter

from protos.ids import NodeId
from protos.model import ModelProfile, TensorCut
from protos.plan import Layout, NodeView, RankCost
from strategies import cost
from strategies.base import Inputs, PlacedEstimate
from strategies.links import Link, all_have_gpu, carrying_s, worst_link
from strategies.memory import bytes_per_parameter, sample_bytes, shard_reserve_bytes
from strategies.shared_model import Ranks, Step, placed

TENSOR_RTT_S = 0.001  # above, waiting for the parts of every layer excludes it
LAYER_S = 3.3e-3  # of a core, of a layer that is cut, in one pass: what its distributed tensors cost to handle
SETTLING = 3  # collectives of a step beside those of the layers: its seed, gradients that all have, loss and norm


def tensor(inputs: Inputs, ranks: Ranks) -> PlacedEstimate | None:
    """None where the links are too slow, a rank has no room for one sample, or so many ranks cannot cut the model."""
    profile, train, count = inputs.profile, inputs.spec.train, ranks.count
    link = worst_link(inputs.cluster, ranks.nodes)
    cut = next((each for each in profile.tensor_cuts if each.ranks == count), None)
    if cut is None or link.rtt_s > TENSOR_RTT_S:
        return None
    held = profile.parameters - cut.parameters * (1 - 1 / count)
    fixed = held * bytes_per_parameter(train.optimizer) + shard_reserve_bytes()
    rows = min(int((ranks.room(node) - fixed) / max(sample_bytes(profile), 1e-9)) for node in ranks.nodes)
    if rows < 1:
        return None
    pieces = math.ceil(train.batch_size / rows) if train.accumulate == "auto" else train.accumulate
    if math.ceil(train.batch_size / pieces) > rows:
        return None
    sent = sent_bytes(profile, cut, train.batch_size, gpu=all_have_gpu(ranks.nodes))
    collectives = pieces * (cut.sums + cut.gathers) + SETTLING
    network_s = _network_s(cut, pieces, sent, link)
    network_s += collectives * max(cost.stretched_s(cost.COLLECTIVE_S, node.capacity) for node in ranks.nodes)
    costs, passed_s, compute_s, optimizer_s = [], 0.0, 0.0, 0.0
    for node in ranks.nodes:
        overhead_s, sample_s = _speed(inputs, cut, node)
        pass_s = pieces * overhead_s + sample_s * train.batch_size
        update_s = cost.optimizer_s(held, node.capacity, train)
        carried_s = carrying_s(ranks.network, network_s, sent, collectives, node)
        passed_s = max(passed_s, cost.in_group_s(pass_s, network_s, carried_s, node.capacity, 1.0, collectives))
        compute_s, optimizer_s = max(compute_s, pass_s), max(optimizer_s, update_s)
        costs.append(RankCost(node.node_id, pass_s + update_s, pieces * overhead_s, sent))
    memory = Counter[NodeId]()
    for node in ranks.nodes:
        memory[node.node_id] = int(fixed + math.ceil(train.batch_size / pieces) * sample_bytes(profile))
    return placed(
        inputs,
        ranks,
        (train.batch_size,) * count,
        pieces,
        Layout(((0, len(profile.layers)),), tensor=count),
        Step(compute_s, passed_s, optimizer_s, network_s, sent),
        costs,
        memory,
    )


def sent_bytes(profile: ModelProfile, cut: TensorCut, batch: int, *, gpu: bool) -> float:
    """By each rank in a step of `batch` samples. Gradients of what every rank holds whole are averaged once."""
    share = (cut.ranks - 1) / cut.ranks
    whole = 4.0 * (profile.parameters - cut.parameters)
    passed = share * batch * (2 * cut.summed_bytes_per_sample + cut.gathered_bytes_per_sample)
    return passed + cost.all_reduce_bytes(cut.ranks, whole, gpu=gpu) / cut.ranks


def _network_s(cut: TensorCut, pieces: int, sent: float, link: Link) -> float:
    """Around a ring: a sum takes 2 (k - 1) hops, a gathering k - 1."""
    hops = (cut.ranks - 1) * (2 * (pieces * cut.sums + SETTLING) + pieces * cut.gathers)
    return hops * link.rtt_s / 2 + sent / link.bytes_per_s


def _speed(inputs: Inputs, cut: TensorCut, node: NodeView) -> tuple[float, float]:
    """Of a pass whatever its rows, and of a sample: 1 / k of what is cut, all of the rest."""
    profile, gone = inputs.profile, 1 - 1 / cut.ranks
    whole = cost.speed(profile, node.capacity, inputs.spec.train)
    family = "tiny" if profile.flops_per_sample < cost.TINY_FLOPS_PER_SAMPLE else "matmul"
    rate = cost.family_rate(node.capacity, family).flops
    sample_s = whole.seconds_per_sample - gone * cost.TRAINING_FACTOR * cut.flops_per_sample / rate
    overhead_s = whole.overhead_s - cost.weights_s(cost.PASS_BYTES, gone * cut.parameters, node.capacity)
    return overhead_s + cost.stretched_s(cut.layers * LAYER_S, node.capacity), max(sample_s, 1e-12)
