"""What a plan really takes in a simulated world: not the planner's formulas.

Kernels lose efficiency as they shrink and working sets slow down beyond the cache; ranks vary from step to step and a
group waits for the slowest of each; links carry others' traffic, collectives crowd each other and hide only partly
behind computing; a pipeline is run micro-batch by micro-batch. Every node is off by a persistent factor for each family
and kind of work, every network for each kind of work: exp(sigma * z). Pure; sigma is passed in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.sim_world import Hidden, Job, World
from protos.ids import NodeId
from protos.jobspec import StrategyName
from strategies.base import PlacedEstimate
from strategies.cost import layer_family
from strategies.memory import bytes_per_parameter

RUN_NOISE = 0.05
BUCKET_BYTES = 25e6
BLOCK_S = 1.5e-3  # of gathering and scattering a block: hooks
REGROUP_S = 2.5
_QUANTILES = (-1.4, -0.67, -0.25, 0.08, 0.43, 0.84, 1.4)  # of a usual group: the slowest of them counts


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of a usual step, what each rank computes of it, and bytes each node needs."""

    seconds: float
    ranks: tuple[float, ...]
    memory_bytes: dict[NodeId, float]


@dataclass(frozen=True, slots=True)
class Truth:
    world: World
    sigma: float

    def step(self, job: Job, strategy: str, placed: PlacedEstimate) -> Step:
        match strategy:
            case StrategyName.PIPELINE_PARALLEL:
                return self._pipeline(job, placed)
            case StrategyName.MODEL_PARALLEL:
                return self._shards(job, placed)
            case _:
                return self._whole(job, strategy, placed)

    def _whole(self, job: Job, strategy: str, placed: PlacedEstimate) -> Step:
        layers = range(len(job.profile.layers))
        again = 4 / 3 if placed.layout is not None and placed.layout.checkpoint_activations else 1.0
        computing, updating, memory = [], [], {}
        for placement, pieces in zip(placed.placements, placed.accumulate, strict=True):
            rows = placement.samples / pieces
            one_s = again * self._compute_s(job, placement.node_id, strategy, layers, rows)
            computing.append(pieces * (one_s + self._passing_s(job, placement.node_id)))
            updating.append(self._update_s(job, placement.node_id, 1.0))
            bucket = 4.0 if len(placed.placements) > 1 else 0.0
            memory[placement.node_id] = self._memory(job, layers, rows / again**4, bucket=bucket, adding=pieces > 1)
        nodes = placed.nodes
        busy_s = self._slowest_s(nodes, computing)
        network_s = self._all_reduce_s(nodes, 4.0 * job.profile.parameters, strategy, placed.compression)
        hidden_s = self.world.wires.overlap * min(network_s, 2 / 3 * busy_s)
        seconds = busy_s + network_s - hidden_s + max(updating)
        return Step(seconds, tuple(map(sum, zip(computing, updating, strict=True))), memory)

    def _shards(self, job: Job, placed: PlacedEstimate) -> Step:
        strategy, nodes = StrategyName.MODEL_PARALLEL.value, placed.nodes
        layers, count = job.profile.layers, len(placed.placements)
        network = self._network_factor(strategy)
        rtt_s, rate = self._worst(nodes)
        crowd = 1 + self.world.wires.crowding * max(0, len(set(nodes)) - 2)
        computing, updating, memory = [], [], dict.fromkeys(nodes, 0.0)
        largest = 2 * max(layer.parameters for layer in layers)
        for placement, pieces in zip(placed.placements, placed.accumulate, strict=True):
            sharing = nodes.count(placement.node_id)
            rows = placement.samples / pieces
            one_s = sharing * self._compute_s(job, placement.node_id, strategy, range(len(layers)), rows)
            gathered_s = sharing * 24 * job.profile.parameters / self._machine(placement.node_id).memory_bytes_per_s
            computing.append(pieces * (one_s + gathered_s + len(layers) * BLOCK_S))
            updating.append(sharing * self._update_s(job, placement.node_id, 1 / count))
            need = self._memory(job, range(len(layers)), rows, share=1 / count) + 8 * largest
            memory[placement.node_id] += need
        blocks_s = 0.0
        for layer in layers:
            share = (count - 1) / count * 4.0 * layer.parameters
            blocks_s += 3 * (share / rate * crowd + (count - 1) * (rtt_s / 2 + self.world.wires.handing_s))
        network_s = network * placed.accumulate[0] * blocks_s
        busy_s = self._slowest_s(nodes, computing)
        hidden_s = 0.3 * self.world.wires.overlap * min(network_s, busy_s)
        ranks = tuple(map(sum, zip(computing, updating, strict=True)))
        return Step(busy_s + network_s - hidden_s + max(updating), ranks, memory)

    def _pipeline(self, job: Job, placed: PlacedEstimate) -> Step:
        strategy, layout = StrategyName.PIPELINE_PARALLEL.value, placed.layout
        assert layout is not None
        count, micro = len(layout.stages), placed.accumulate[0]
        network, ranks, memory = self._network_factor(strategy), list[float](), dict.fromkeys(placed.nodes, 0.0)
        longest_s = updating_s = 0.0
        for replica in range(layout.replicas):
            chain = placed.placements[replica * count : (replica + 1) * count]
            rows = math.ceil(chain[0].samples / micro)
            passes = math.ceil(chain[0].samples / rows)
            stage_s, sent_s = [], []
            for (first, last), placement in zip(layout.stages, chain, strict=True):
                piece = range(first, last)
                part = sum(job.profile.layers[k].parameters for k in piece) / job.profile.parameters
                one_s = self._compute_s(job, placement.node_id, strategy, piece, rows) + self.world.wires.handing_s
                one_s += part * self._passing_s(job, placement.node_id, 24)
                update_s = self._update_s(job, placement.node_id, part)
                stage_s.append(one_s)
                updating_s = max(updating_s, update_s)
                ranks.append(passes * one_s + update_s)
                held = min(passes, count - placement.stage)
                memory[placement.node_id] += self._memory(job, piece, rows * held, adding=True)
            for (a, b), (_, last) in zip(pairwise(chain), layout.stages, strict=False):
                crossing = rows * job.profile.layers[last - 1].output_bytes_per_sample
                rtt_s, rate = self._worst((a.node_id, b.node_id))
                sent_s.append(network * (rtt_s / 2 + self.world.wires.handing_s + crossing / rate))
            jitter = 1 + sum(self._machine(placement.node_id).jitter for placement in chain) / count
            longest_s = max(longest_s, jitter * _wave_s(stage_s, sent_s, passes))
        averaged_s = 0.0
        for stage, (first, last) in enumerate(layout.stages):
            slot = [placement.node_id for placement in placed.placements if placement.stage == stage]
            volume = 4.0 * sum(job.profile.layers[k].parameters for k in range(first, last))
            averaged_s += 0.7 * self._all_reduce_s(slot, volume, strategy)  # stages share the links
        return Step(longest_s + averaged_s + updating_s, tuple(ranks), memory)

    def _compute_s(self, job: Job, node_id: NodeId, strategy: str, layers: range, rows: float) -> float:
        """Forward and backward of a micro-batch."""
        machine, total = self._machine(node_id), 0.0
        for index in layers:
            layer = job.profile.layers[index]
            family = layer_family(layer)
            factor = math.exp(self.sigma * self.world.errors[node_id, family, strategy])
            total += factor * machine.kernel_s(
                family, layer.flops_per_sample * rows, layer.activation_bytes_per_sample * rows
            )
        return total

    def _passing_s(self, job: Job, node_id: NodeId, bytes_each: float = 12) -> float:
        """Weights read and gradients written, whatever the rows."""
        return bytes_each * job.profile.parameters / self._machine(node_id).memory_bytes_per_s

    def _update_s(self, job: Job, node_id: NodeId, share: float) -> float:
        moved = 1.1 * (2 * bytes_per_parameter(job.spec.train.optimizer) - 4)
        return share * moved * job.profile.parameters / self._machine(node_id).memory_bytes_per_s

    def _slowest_s(self, nodes: Sequence[NodeId], computing: Sequence[float]) -> float:
        """Mean over steps of the slowest rank: each varies by itself."""
        total = 0.0
        for turn in range(len(_QUANTILES)):
            slow = [_QUANTILES[(turn * (2 * rank + 1) + rank) % len(_QUANTILES)] for rank in range(len(nodes))]
            total += max(
                seconds * (1 + self._machine(node).jitter * more)
                for node, seconds, more in zip(nodes, computing, slow, strict=True)
            )
        return total / len(_QUANTILES)

    def _all_reduce_s(
        self, nodes: Sequence[NodeId], volume_bytes: float, strategy: str, compression: str = "none"
    ) -> float:
        """In buckets over a ring of neighbours, each hop with a message to handle."""
        count = len(nodes)
        if count < 2:
            return 0.0
        sent = volume_bytes / (2 if compression == "fp16" else 1)
        hops = [self._worst(pair) for pair in pairwise([*nodes, nodes[0]])]
        crowd = 1 + self.world.wires.crowding * (count - 2)
        message_s = max(rtt_s for rtt_s, _ in hops) / 2 + self.world.wires.handing_s
        bytes_s = 2 * (count - 1) / count * sent / min(rate for _, rate in hops) * crowd
        codec_s = volume_bytes / 1.2e9 if compression == "fp16" else 0.0
        return self._network_factor(strategy) * (
            math.ceil(sent / BUCKET_BYTES) * 2 * (count - 1) * message_s + bytes_s + codec_s
        )

    def _network_factor(self, strategy: str) -> float:
        return math.exp(self.sigma * self.world.errors["network", strategy])

    def _worst(self, nodes: Sequence[NodeId]) -> tuple[float, float]:
        """The longest round trip of two and the lowest rate, as the links are."""
        machines = sorted((self._machine(node) for node in set(nodes)), key=lambda machine: -machine.wire_rtt_s)
        rtt_s = sum(machine.wire_rtt_s for machine in machines[:2]) / 2
        rate = min((machine.wire_bytes_per_s for machine in machines), default=1.0)
        return rtt_s, rate * (1 - self.world.wires.background)

    def _memory(
        self, job: Job, layers: range, rows: float, share: float = 1.0, bucket: float = 0.0, adding: bool = False
    ) -> float:
        """At the fullest moment of a backward pass: activations of the layers before it, gradients of those after.
        Where gradients are `adding` up they are there all along, and the newest layer's beside them."""
        found = [job.profile.layers[index] for index in layers]
        parameters = sum(layer.parameters for layer in found) * share
        each = [rows * (1 + self.world.spare_memory) * layer.activation_bytes_per_sample for layer in found]
        passing = most = sum(each)
        for layer, held in zip(reversed(found), reversed(each), strict=True):
            passing += 0.0 if adding else 4 * share * layer.parameters
            most = max(most, passing + (4 * layer.parameters if adding else 0.0))
            passing -= held
        state = bytes_per_parameter(job.spec.train.optimizer) - (0 if adding else 4) + bucket
        return parameters * state + most + 3.0e8

    def _machine(self, node_id: NodeId) -> Hidden:
        return self.world.hidden[node_id]

    def switch_s(self, job: Job, nodes: Sequence[NodeId]) -> float:
        """Another group forms, and the state goes to all of it."""
        _, rate = self._worst(nodes) if len(set(nodes)) > 1 else (0.0, math.inf)
        return REGROUP_S + (bytes_per_parameter(job.spec.train.optimizer) - 4) * job.profile.parameters / rate

    def startup_s(self, job: Job, strategy: str, nodes: Sequence[NodeId]) -> float:
        """Until the first step: worker, group, a trace of what is cut, the data over each node's own way."""
        rate = min(self._machine(node).wire_bytes_per_s for node in nodes)
        traced_s = 0.5 + 0.02 * len(job.profile.layers) if strategy == "pipeline_parallel" else 0.0
        return 0.2 + 0.2 * (len(nodes) > 1) + traced_s + job.data.bytes / rate


def noise(rng: random.Random) -> float:
    """Of one run."""
    return math.exp(rng.gauss(0, RUN_NOISE))


def _wave_s(stage_s: Sequence[float], sent_s: Sequence[float], micro_batches: int) -> float:
    """All micro-batches through the stages and their gradients back, each stage one at a time."""
    total = 0.0
    for parts, sends in (
        ([seconds / 3 for seconds in stage_s], sent_s),
        ([2 * seconds / 3 for seconds in reversed(stage_s)], list(reversed(sent_s))),
    ):
        free = [0.0] * len(parts)
        for _ in range(micro_batches):
            arrives = 0.0
            for stage, seconds in enumerate(parts):
                free[stage] = max(free[stage], arrives) + seconds
                arrives = free[stage] + (sends[stage] if stage < len(sends) else 0.0)
        total += free[-1]
    return total
