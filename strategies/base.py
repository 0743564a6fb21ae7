"""What every strategy answers before anything runs: may it, what would it cost, and how is the job cut.

Owns the protocol and the question put to a strategy. Plain python: the half that
runs is in *_torch.py files. Invariant: a strategy that has no reason against a job can estimate and decompose it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from protos.errors import NoPlacement
from protos.ids import NodeId
from protos.jobspec import JobSpec, StrategyName, StrategyOptions
from protos.model import ModelProfile
from protos.plan import (
    ClusterView,
    CostEstimate,
    DataProfile,
    Layout,
    LinkUse,
    NodeView,
    Placement,
    PlannedSubtask,
)
from strategies import learned

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
    _answers: dict[StrategyName, Answer] = field(default_factory=dict, init=False, repr=False, compare=False)

    def answer(self, strategy: StrategyName, compute: Callable[[Inputs], Answer]) -> Answer:
        """What a strategy says to this question, worked out once: `feasible` and `estimate` both need all of it. It is
        asked with the rates that finished jobs have taught."""
        if strategy not in self._answers:
            answer = compute(learned.corrected(self, strategy))
            if isinstance(answer, tuple):
                known: Answer = self._why_memory(strategy, compute) or answer
            else:
                known = learned.remembered(self, strategy, answer)
            self._answers[strategy] = known
        return self._answers[strategy]

    def _why_memory(self, strategy: StrategyName, compute: Callable[[Inputs], Answer]) -> tuple[str, ...]:
        """Reasons beside what such models were seen to need of memory: those of the predictions as they are, so that
        they name what is predicted and granted; what was seen, when that alone stands against it."""
        families = {learned.family_of(self.profile, node.capacity) for node in self.eligible}
        needed = {name: factor for name, factor in self.cluster.learned.memory.items() if name in families}
        if not needed:
            return ()
        plain = replace(self, cluster=replace(self.cluster, learned=replace(self.cluster.learned, memory={})))
        reasons = reasons_of(compute(learned.corrected(plain, strategy)))
        times = " and ".join(f"{factor:.2f} times the memory predicted for {name}" for name, factor in needed.items())
        return reasons or (f"fits as predicted, but jobs that ran out of memory before needed {times} layers",)

    def options(self, strategy: StrategyName) -> StrategyOptions:
        """What the job file asks of this strategy; everything left open when it names another or none."""
        named = self.spec.strategy == strategy and self.spec.strategy_options
        return named or StrategyOptions()

    @property
    def holding(self) -> frozenset[NodeId]:
        """The holders that are eligible; a plan takes one of them when there are any."""
        return self.holders & {node.node_id for node in self.eligible}

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
    """The best plan inside one strategy. `accumulate` is per rank; `transfer_s` the longest wait for data.

    `layout` None: every rank holds the whole model.
    """

    cost: CostEstimate
    placements: tuple[Placement, ...]
    accumulate: tuple[int, ...]
    steps: int | None
    network: str = ""
    compression: str = "none"
    transfer_s: float = 0.0
    layout: Layout | None = None
    links: tuple[LinkUse, ...] = ()

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(placement.node_id for placement in self.placements)


Answer = PlacedEstimate | tuple[str, ...]
"""The best plan, or the reasons why there is none."""


def reasons_of(answer: Answer) -> tuple[str, ...]:
    return answer if isinstance(answer, tuple) else ()


def placed_of(strategy: StrategyName, answer: Answer) -> PlacedEstimate:
    if isinstance(answer, tuple):
        raise NoPlacement(f"{strategy}: {'; '.join(answer)}", "hive nodes shows what each node grants")
    return answer


class Strategy(Protocol):
    """`estimate` and `decompose` are for inputs that `feasible` has no reason against; else NoPlacement is raised."""

    @property
    def name(self) -> StrategyName: ...

    def feasible(self, inputs: Inputs) -> tuple[str, ...]:
        """Why it cannot be, one clause each; empty when it can."""

    def estimate(self, inputs: Inputs) -> PlacedEstimate: ...

    def decompose(self, inputs: Inputs, placed: PlacedEstimate) -> tuple[PlannedSubtask, ...]: ...


def train_subtasks(inputs: Inputs, placed: PlacedEstimate, synchronization: str) -> tuple[PlannedSubtask, ...]:
    """One per rank: its stage's layers over its replica's contiguous slice of each global batch."""
    layers, layout = inputs.profile.layers, placed.layout
    subtasks = []
    slices: dict[int, tuple[int, int]] = {}
    on_node: Counter[NodeId] = Counter()
    gpus = {node.node_id: len(node.capacity.gpus) for node in inputs.cluster.nodes}
    for placement, accumulate in zip(placed.placements, placed.accumulate, strict=True):
        replica = placement.rank if layout is None else placement.replica
        if replica not in slices:
            start = max((end for _, end in slices.values()), default=0)
            slices[replica] = (start, start + placement.samples)
        first, last = (0, len(layers)) if layout is None else layout.stages[placement.stage]
        subtasks.append(
            PlannedSubtask(
                type="train",
                node_id=placement.node_id,
                rank=placement.rank,
                data_range=slices[replica],
                layer_range=(first, last),
                input_shape=layers[first - 1].output_shape if first else inputs.profile.input_shape or (),
                output_shape=layers[last - 1].output_shape if last else (),
                stage=placement.stage,
                replica=replica,
                synchronization=synchronization,
                accumulate=accumulate,
                device=on_node[placement.node_id] if gpus.get(placement.node_id) else 0,
            )
        )
        on_node[placement.node_id] += 1
    return tuple(subtasks)
