"""Predictions as finished jobs have taught them: pure.

Before a strategy is asked, the measured rates of every node and the links are corrected by what was learned for this
model, family of layers and kind of work (`corrected`); a step that was measured in the very same combination of job and
placement then stands in the place of the predicted one (`remembered`). Writes into the estimate under which keys its
outcome is to be learned. Learning itself is coordinator/speeds.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import geometric_mean
from typing import TYPE_CHECKING

from protos.capacity import Capacity, FamilyRate, LinkEstimate
from protos.ids import NodeId
from protos.jobspec import StrategyName, TrainSpec
from protos.model import ModelProfile
from protos.plan import Basis, ClusterView, CostEstimate, Factors, Learned, NodeView, RankCost, Work
from strategies import cost
from strategies.links import link_between, network_between
from strategies.memory import expected_bytes

if TYPE_CHECKING:
    from strategies.base import Inputs, PlacedEstimate

TRANSFER = 0.5  # of the logarithm of a factor: a node is off by as much of its own as by the kind of work
MOST_SURPRISE = 2.0  # of which so much is transferred: beyond what calibrations are off by, it is cheaper to try
CUT_BINS = 2  # for each doubling of a rank's share
SEVERAL = 3  # nodes that were off alike, before it is the model's doing
WORK_OF = {
    StrategyName.SINGLE_NODE: Work.WHOLE,
    StrategyName.DATA_PARALLEL: Work.REPLICA,
    StrategyName.PIPELINE_PARALLEL: Work.STAGE,
    StrategyName.MODEL_PARALLEL: Work.SHARD,
}


def corrected(inputs: Inputs, strategy: StrategyName) -> Inputs:
    """The same question, rates and links as they turned out for this kind of work."""
    learned, work = inputs.cluster.learned, WORK_OF[strategy]
    if learned == Learned():
        return inputs
    known = factors(inputs, work)
    nodes = tuple(_corrected(node, known[node.node_id]) for node in inputs.cluster.nodes)
    if learned.memory:
        nodes = tuple(replace(node, memory_factor=memory_factor(inputs, node)) for node in nodes)
    links = {**inputs.cluster.links, **_links(inputs.cluster, work)}
    return replace(inputs, cluster=replace(inputs.cluster, nodes=nodes, links=links))


def remembered(inputs: Inputs, strategy: StrategyName, placed: PlacedEstimate) -> PlacedEstimate:
    """The estimate with its keys, and with the measured step where there is one. `inputs` are the uncorrected ones."""
    estimate, work = placed.cost, WORK_OF[strategy]
    nodes, known = {node.node_id: node for node in inputs.cluster.nodes}, factors(inputs, work)
    here = Counter(rank.node_id for rank in estimate.ranks)
    ranks = tuple(
        replace(
            rank,
            cores=nodes[rank.node_id].capacity.cores / here[rank.node_id],
            family=family_of(inputs.profile, nodes[rank.node_id].capacity),
            learned=known[rank.node_id],
            memory_factor=memory_factor(inputs, nodes[rank.node_id]),
        )
        for rank in estimate.ranks
    )
    if inputs.cluster.learned.memory:
        memory = {
            node_id: expected_bytes(
                need, 1 if nodes[node_id].capacity.gpus else here[node_id], memory_factor(inputs, nodes[node_id])
            )
            for node_id, need in estimate.memory_bytes.items()
        }
        estimate = replace(estimate, memory_bytes=memory)
    key = combination(inputs, strategy, placed)
    learned = inputs.cluster.learned
    step_s = learned.steps.get(key)
    model, network_factor = model_key(inputs.profile, inputs.spec.train), learned.networks.get((placed.network, work))
    basis = Basis(work, model, key, estimate.step_s, step_s is not None, network_factor or 1.0)
    if step_s is None:
        return replace(placed, cost=replace(estimate, ranks=ranks, basis=basis))
    steps = cost.assumed_steps(inputs.profile, inputs.spec.train, inputs.data)
    seconds = max(0.0, estimate.seconds + steps * (step_s - estimate.step_s))
    return replace(placed, cost=replace(estimate, seconds=seconds, step_s=step_s, ranks=ranks, basis=basis))


def memory_factor(inputs: Inputs, node: NodeView) -> float:
    """What models of its family needed of memory, times what was predicted, where one ran out of it."""
    known = inputs.cluster.learned.memory
    return known.get(family_of(inputs.profile, node.capacity), 1.0) if known else 1.0


def with_running(inputs: Inputs, estimate: CostEstimate, step_s: float, alone_s: Mapping[int, float]) -> Inputs:
    """The same question, and what a group that runs now takes for a step. `alone_s`: what its ranks compute in one
    (coordinator/speeds.py), as far as they have said so.

    A node that works alone and is slower than predicted has other things to do, or its rates were wrong. Of several
    nodes only what each computes by itself says so: waiting takes them long. A node that is slower than it was when it
    worked on this model before is so at any kind of work; else it counts where nothing is known, and as TRANSFER says.
    """
    basis, cluster = estimate.basis, inputs.cluster
    if basis is None:
        return inputs
    if len(estimate.ranks) == 1 and estimate.step_s > 0:
        alone_s = {0: estimate.ranks[0].compute_s * step_s / estimate.step_s}
    learned, models = cluster.learned, dict(cluster.learned.models)
    known = {work: factors(inputs, work) for work in Work} if alone_s else {}
    for node_id, (rank, seconds) in _slowest(estimate, alone_s).items():
        if node_id not in known[basis.work]:
            continue
        own = (node_id, basis.model, basis.work)
        surprise = seconds / _expected_s(rank, known[basis.work][node_id])
        for work in Work:
            key, expected = (node_id, basis.model, work), _off(rank, known[work][node_id])
            if work is basis.work or own in learned.models:
                models[key] = expected * surprise
            elif key not in learned.models:
                models[key] = expected * min(max(surprise, 1 / MOST_SURPRISE), MOST_SURPRISE) ** TRANSFER
    steps = {**learned.steps, basis.combination: step_s}
    return replace(inputs, cluster=replace(cluster, learned=replace(learned, steps=steps, models=models)))


def _slowest(estimate: CostEstimate, alone_s: Mapping[int, float]) -> dict[NodeId, tuple[RankCost, float]]:
    """Of each node the rank that is slowest beside what was predicted of it, and its seconds."""
    found: dict[NodeId, tuple[RankCost, float]] = {}
    for number, seconds in alone_s.items():
        rank = estimate.ranks[number]
        plain_s = _expected_s(rank, Factors())
        before = found.get(rank.node_id)
        if (
            plain_s > 0
            and seconds > 0
            and (before is None or seconds / plain_s > before[1] / _expected_s(before[0], Factors()))
        ):
            found[rank.node_id] = rank, seconds
    return found


def _expected_s(rank: RankCost, factors: Factors) -> float:
    """What the rank computes by the formulas, with these factors in the place of those that it was predicted with."""
    overhead_s = rank.overhead_s / rank.learned.overhead
    work_s = max(0.0, rank.compute_s - rank.overhead_s) / rank.learned.work
    return factors.overhead * overhead_s + factors.work * work_s


def _off(rank: RankCost, factors: Factors) -> float:
    """One factor for both, where they are mixed as in this rank."""
    return _expected_s(rank, factors) / _expected_s(rank, Factors())


def factors(inputs: Inputs, work: Work) -> dict[NodeId, Factors]:
    """What is known of this model on each node. Where it never ran: what is known of its family of layers there, times
    what the model was slower than its family elsewhere. Where no such layers ever ran: what others were off by."""
    learned, train = inputs.cluster.learned, inputs.spec.train
    own = learned.of_model(model_key(inputs.profile, train), work)
    found, families = {}, dict[str, _OfFamily]()
    for node in inputs.cluster.nodes:
        if (factor := own.get(node.node_id)) is not None:
            found[node.node_id] = Factors(factor, factor)
            continue
        family = family_of(inputs.profile, node.capacity)
        if family not in families:
            families[family] = _of_family(learned, family, work)
        known = families[family].nodes
        here = known.get(node.node_id) or families[family].elsewhere
        speed = cost.speed(inputs.profile, node.capacity, train)
        most_is_work = speed.seconds_per_sample * train.batch_size > speed.overhead_s
        shared = several(
            factor / ((part.work if most_is_work else part.overhead) if (part := known.get(each)) else 1.0)
            for each, factor in own.items()
        )
        found[node.node_id] = Factors(here.work * shared, here.overhead * shared)
    return found


@dataclass(frozen=True, slots=True)
class _OfFamily:
    """Of a family of layers: what is known of it by node, and what to expect of a node where it never ran."""

    nodes: Mapping[NodeId, Factors]
    elsewhere: Factors


def _of_family(learned: Learned, family: str, work: Work) -> _OfFamily:
    nodes = {each: _at(kinds, work) for each, kinds in learned.of_family(family).items()}
    parts = (several(each.work for each in nodes.values()), several(each.overhead for each in nodes.values()))
    return _OfFamily(nodes, Factors(*parts))


def several(seen: Iterable[float]) -> float:
    """The factor to expect of one more node. That one or two were off is their own doing; that several were, and by
    about as much, is the model's: their mean logarithm, less the share that nodes which differ so much would have by
    chance, (s^2 / n) / mean^2. What is 1 was never learned, and says nothing."""
    logarithms = [math.log(factor) for factor in seen if factor != 1.0]
    if len(logarithms) < SEVERAL:
        return 1.0
    count = len(logarithms)
    mean = sum(logarithms) / count
    variance = sum((each - mean) ** 2 for each in logarithms) / (count - 1)
    by_chance = variance / count / mean**2 if mean else 1.0
    return math.exp(max(0.0, 1.0 - by_chance) * mean)


def _at(kinds: Mapping[Work, Factors], work: Work) -> Factors:
    """Else of the family at other kinds of work, as far as that says something of this one."""
    if work in kinds:
        return kinds[work]
    return Factors(
        geometric_mean(each.work for each in kinds.values()) ** TRANSFER,
        geometric_mean(each.overhead for each in kinds.values()) ** TRANSFER,
    )


def family_of(profile: ModelProfile, capacity: Capacity) -> str:
    """Of the layers in which this node spends most of a sample's time."""
    seconds = {
        name: flops / cost.family_rate(capacity, name).flops for name, flops in cost.family_flops(profile).items()
    }
    return max(seconds, key=lambda name: seconds[name])


def model_key(profile: ModelProfile, train: TrainSpec) -> str:
    """The same for every job that computes the same: not the name, nor the number of steps."""
    return _digest(
        profile.family.value,
        profile.parameters,
        profile.flops_per_sample,
        profile.activation_bytes_per_sample,
        len(profile.layers),
        train.optimizer.name,
        train.precision,
    )


def combination(inputs: Inputs, strategy: StrategyName, placed: PlacedEstimate) -> str:
    """Of a model, a batch, where each part of it runs and, roughly, how many samples each rank takes. Which of several
    replicas is which plays no part."""
    layout, batch = placed.layout, inputs.spec.train.batch_size
    shape = (layout.stages, layout.replicas, layout.schedule, layout.sharded, layout.tensor) if layout else ()
    replicas: dict[int, list[tuple[int, str, int]]] = {}
    for each in placed.placements:
        replicas.setdefault(each.replica, []).append((each.stage, each.node_id, _share(each.samples, batch)))
    return _digest(
        model_key(inputs.profile, inputs.spec.train),
        batch,
        strategy.value,
        placed.compression,
        sorted(sorted(ranks) for ranks in replicas.values()),
        shape,
        max(placed.accumulate),
        layout.checkpoint_activations if layout else False,
    )


def _share(samples: int, batch: int) -> int:
    """The same for most shares that differ by no more than what is learned from one job to the next makes them differ:
    a step is remembered although they are not equal."""
    return round(CUT_BINS * math.log2(max(1, samples) / batch))


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _corrected(node: NodeView, factors: Factors) -> NodeView:
    if factors == Factors():
        return node
    capacity = node.capacity
    names = {*capacity.families, "matmul"}
    families = {name: _slowed(cost.family_rate(capacity, name), factors) for name in names}
    bandwidth = capacity.memory_bandwidth
    if bandwidth is not None:
        bandwidth = replace(bandwidth, best=bandwidth.best / factors.work, p50=bandwidth.p50 / factors.work)
    return replace(node, capacity=replace(capacity, families=families, memory_bandwidth=bandwidth))


def _slowed(rate: FamilyRate, factors: Factors) -> FamilyRate:
    return replace(rate, flops=rate.flops / factors.work, overhead_s=rate.overhead_s * factors.overhead)


def _links(cluster: ClusterView, work: Work) -> dict[tuple[NodeId, NodeId], LinkEstimate]:
    """Pairs of a network of which something was learned."""
    factors = {network: factor for (network, kind), factor in cluster.learned.networks.items() if kind is work}
    found = {}
    for a, b in combinations(cluster.nodes, 2) if factors else ():
        network = network_between(cluster, a, b)
        factor = factors.get(network)
        if factor is not None:
            link = link_between(cluster, a, b)
            pair = (min(a.node_id, b.node_id), max(a.node_id, b.node_id))
            found[pair] = LinkEstimate(link.rtt_s * factor, link.bytes_per_s / factor, network)
    return found
