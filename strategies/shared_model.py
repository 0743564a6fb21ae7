"""What shards and parts of layers have in common: their ranks, and how what they cost becomes an estimate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from protos.ids import NodeId
from protos.plan import CostEstimate, Layout, NodeView, Placement, RankCost
from strategies import cost
from strategies.base import Inputs, PlacedEstimate
from strategies.links import collected_s, download_s, link_uses, ring_traffic
from strategies.memory import budget_bytes


@dataclass(frozen=True, slots=True)
class Ranks:
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
        return budget_bytes(node) / (1 if node.capacity.gpus else self.here[node.node_id])


@dataclass(frozen=True, slots=True)
class Step:
    compute_s: float
    passed_s: float  # compute with the network
    optimizer_s: float
    network_s: float
    sent_bytes: float  # by each rank


def placed(
    inputs: Inputs,
    ranks: Ranks,
    samples: tuple[int, ...],
    pieces: int,
    layout: Layout,
    step: Step,
    costs: Sequence[RankCost],
    memory: Counter[NodeId],
) -> PlacedEstimate:
    profile, data, train = inputs.profile, inputs.data, inputs.spec.train
    startup_s = cost.startup_s(profile, [node.capacity for node in ranks.nodes])
    transfer_s = max(download_s(data.bytes, node) for node in ranks.nodes)
    elsewhere = 4.0 * profile.parameters * (ranks.count - 1) / ranks.count
    delivery_s = collected_s(inputs.cluster, ranks.nodes, elsewhere)
    batches = (data.test_rows or 0) / train.batch_size
    forward_s = step.passed_s * cost.EVALUATION_FACTOR / cost.TRAINING_FACTOR
    evaluation_s = cost.evaluations(profile, train, data) * batches * forward_s
    step_s = step.passed_s + step.optimizer_s
    estimate = CostEstimate(
        seconds=startup_s + transfer_s + cost.assumed_steps(profile, train, data) * step_s + evaluation_s + delivery_s,
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
            "delivery": delivery_s,
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


def together(units: Sequence[NodeView]) -> tuple[NodeView, ...]:
    counts = Counter(node.node_id for node in units)
    first = {node.node_id: node for node in units}
    return tuple(node for node_id, node in first.items() for _ in range(counts[node_id]))
