"""What every strategy answers before anything runs: may it, what would it cost, and how is the job cut.

Owns the protocol and the question put to a strategy. Plain python: the half that
runs is in *_torch.py files. Invariant: a strategy that has no reason against a job can estimate and decompose it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from protos.ids import NodeId
from protos.jobspec import JobSpec, StrategyName
from protos.model import ModelProfile
from protos.plan import ClusterView, CostEstimate, DataProfile, NodeView, Placement, PlannedSubtask

NOT_BUILT = "not built yet"


@dataclass(frozen=True)
class Inputs:
    """One question: this job, this model, these data, on these nodes.

    `holders`: nodes that have the newest state of the job on their disk; a plan takes at least one of them, so that no
    committed step is lost. Empty for a job that starts.
    """

    spec: JobSpec
    profile: ModelProfile
    data: DataProfile
    cluster: ClusterView
    holders: frozenset[NodeId] = frozenset()

    @cached_property
    def eligible(self) -> tuple[NodeView, ...]:
        """Usable nodes that the job file allows."""
        return tuple(node for node in self.cluster.nodes if not self._excluded(node))

    @property
    def excluded(self) -> tuple[str, ...]:
        """One clause per node that is not eligible."""
        return tuple(f"{node.name} {why}" for node in self.cluster.nodes if (why := self._excluded(node)))

    def _excluded(self, node: NodeView) -> str:
        require = self.spec.nodes.require
        if require.names and node.name not in require.names and node.node_id not in require.names:
            return "is not among nodes.require.names"
        if require.gpu and not node.capacity.gpus:
            return "has no GPU and nodes.require.gpu asks for one"
        if require.memory_bytes and node.capacity.memory_bytes < require.memory_bytes:
            return (
                f"grants {gib(node.capacity.memory_bytes)}, nodes.require.memory_bytes is {gib(require.memory_bytes)}"
            )
        if not node.usable:
            states = (node.link.value, node.eligibility.value, node.activity.value)
            state = next(state for state in states if state not in ("CONNECTED", "OK", "IDLE"))
            return f"is {state}" + (f" ({node.reason})" if node.reason else "")
        return ""


def gib(size_bytes: float) -> str:
    """For sentences: 2.0 GiB, or MiB below a tenth of one."""
    gibibytes = size_bytes / 1024**3
    return f"{gibibytes:.1f} GiB" if gibibytes >= 0.1 else f"{size_bytes / 1024**2:.0f} MiB"


@dataclass(frozen=True, slots=True)
class PlacedEstimate:
    """The best plan inside one strategy. `accumulate` is per rank; `transfer_s` the longest wait for data."""

    cost: CostEstimate
    placements: tuple[Placement, ...]
    accumulate: tuple[int, ...]
    steps: int | None
    network: str = ""
    compression: str = "none"
    transfer_s: float = 0.0

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(placement.node_id for placement in self.placements)


class Strategy(Protocol):
    """`estimate` and `decompose` are for inputs that `feasible` has no reason against; else NoPlacement is raised."""

    @property
    def name(self) -> StrategyName: ...

    def feasible(self, inputs: Inputs) -> tuple[str, ...]:
        """Why it cannot be, one clause each; empty when it can."""

    def estimate(self, inputs: Inputs) -> PlacedEstimate: ...

    def decompose(self, inputs: Inputs, placed: PlacedEstimate) -> tuple[PlannedSubtask, ...]: ...


def train_subtasks(inputs: Inputs, placed: PlacedEstimate, synchronization: str) -> tuple[PlannedSubtask, ...]:
    """Whole-model subtasks over contiguous slices of each global batch, in the order of the ranks."""
    layers = inputs.profile.layers
    subtasks = []
    start = 0
    on_node: Counter[NodeId] = Counter()
    for placement, accumulate in zip(placed.placements, placed.accumulate, strict=True):
        subtasks.append(
            PlannedSubtask(
                type="train",
                node_id=placement.node_id,
                rank=placement.rank,
                data_range=(start, start + placement.samples),
                layer_range=(0, len(layers)),
                input_shape=inputs.profile.input_shape or (),
                output_shape=layers[-1].output_shape if layers else (),
                replica=placement.rank,
                synchronization=synchronization,
                accumulate=accumulate,
                device=on_node[placement.node_id],
            )
        )
        on_node[placement.node_id] += 1
        start += placement.samples
    return tuple(subtasks)
