"""The model cut into stages on several nodes, micro-batches passed from one to the next; or several such chains beside
each other (replicas), which share the cut and average their gradients stage by stage.

Considered for every group of nodes that share a trusted network, every number of replicas and a climb over the number
of micro-batches; strategies/stages.py cuts and orders, strategies/pipeline_estimate.py weighs each chain exactly.
Refuses, with the numbers, what does not fit; options of the job file are obeyed or refused, never bent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from protos.jobspec import StrategyName
from protos.plan import NodeView, PlannedSubtask, Schedule
from strategies import cost
from strategies.base import Answer, Inputs, PlacedEstimate, gib, placed_of, reasons_of, train_subtasks
from strategies.grouping import group_reasons, groups
from strategies.links import Link, TrustedGroup, link_between, ranks_of
from strategies.memory import SHARE, budget_bytes
from strategies.pipeline_estimate import Shape, Unit, Weighed, estimate, load_of, weigh
from strategies.segments import Segments, segments_of, stage_bytes
from strategies.stages import ROUGH_SLACK, SLACK, Chain, Host, Question, Solver

MOST_UNITS = 16  # hosts that are considered: the fastest, or the roomiest when those do not hold the model
PASS_S = 5e-4  # of one micro-batch in one stage on a whole core: the schedule's bookkeeping, sends and receives
_STEP = 1.4  # between two numbers of micro-batches that are worth telling apart


@dataclass(frozen=True, slots=True)
class PipelineParallel:
    name: StrategyName = StrategyName.PIPELINE_PARALLEL

    def feasible(self, inputs: Inputs) -> tuple[str, ...]:
        return reasons_of(inputs.answer(self.name, _answer))

    def estimate(self, inputs: Inputs) -> PlacedEstimate:
        return placed_of(self.name, inputs.answer(self.name, _answer))

    def decompose(self, inputs: Inputs, placed: PlacedEstimate) -> tuple[PlannedSubtask, ...]:
        replicated = placed.layout is not None and placed.layout.replicas > 1
        return train_subtasks(inputs, placed, "activations, all_reduce" if replicated else "activations")


def micro_batch_counts(inputs: Inputs, share: int) -> tuple[int, ...]:
    """Into how many a replica's share may be cut: as asked, else divisors of the batch and powers of two, thinned.

    Divisors are preferred: what is left over of a share would fill and drain the pipeline once more.
    """
    batch = inputs.spec.train.batch_size
    asked = inputs.options(StrategyName.PIPELINE_PARALLEL).microbatches
    if asked is None and inputs.spec.train.accumulate != "auto":
        asked = inputs.spec.train.accumulate
    if asked is not None:
        return (asked,) if asked <= share else ()
    powers = [2**k for k in range(share.bit_length())]
    divisors = [count for count in range(1, math.isqrt(batch) + 1) if batch % count == 0]
    kept: list[int] = []
    for count in sorted({*powers, *divisors, *(batch // count for count in divisors)}):
        if count > share:
            break
        if not kept or count >= _STEP * kept[-1]:
            kept.append(count)
        elif batch % count == 0 and batch % kept[-1]:
            kept[-1] = count
    return tuple(kept)


def _answer(inputs: Inputs) -> Answer:
    profile = inputs.profile
    if reasons := group_reasons(inputs):
        return reasons
    if profile.why_not_cut:
        return (f"the model cannot be cut into stages: {profile.why_not_cut}",)
    segments = segments_of(profile)
    if segments.count < 2:
        return ("the model cannot be cut into stages: it has no place for a cut",)
    if reasons := _option_reasons(inputs, segments):
        return reasons
    best: PlacedEstimate | None = None
    for placed in _candidates(inputs, segments):
        if best is None or placed.cost.seconds < best.cost.seconds:
            best = placed
    return best or _last_reasons(inputs, segments)


def _option_reasons(inputs: Inputs, segments: Segments) -> tuple[str, ...]:
    options, batch = inputs.options(StrategyName.PIPELINE_PARALLEL), inputs.spec.train.batch_size
    stages, replicas = options.stages or 2, options.replicas or 1
    ranks = max(sum(map(ranks_of, group.nodes)) for group in groups(inputs))
    if stages > segments.count:
        return (f"stages: {stages} was asked for, the model can be cut into {segments.count} at most",)
    if stages * replicas > ranks:
        return (f"{stages} stages x {replicas} replicas need {stages * replicas} nodes, {ranks} share a network",)
    if replicas > 1 and inputs.spec.sync.compression == "fp16":
        return ("replicas average their gradients uncompressed: set sync.compression to auto or none",)
    if batch < replicas:
        return (f"a batch of {batch} samples has none for each of {replicas} replicas",)
    if not micro_batch_counts(inputs, batch // replicas):
        asked = options.microbatches or inputs.spec.train.accumulate
        return (f"{asked} micro-batches were asked for, a replica has {batch // replicas} samples of each batch",)
    if _schedule(inputs) is Schedule.ONE_F_ONE_B and max(micro_batch_counts(inputs, batch // replicas)) < stages:
        return (f"{stages} stages need as many micro-batches under 1f1b; ask for more, or for schedule: gpipe",)
    return ()


def _schedule(inputs: Inputs) -> Schedule:
    return Schedule(inputs.options(StrategyName.PIPELINE_PARALLEL).schedule or Schedule.ONE_F_ONE_B)


def _candidates(inputs: Inputs, segments: Segments) -> Iterator[PlacedEstimate]:
    asked, batch = inputs.options(StrategyName.PIPELINE_PARALLEL), inputs.spec.train.batch_size
    for group in groups(inputs):
        found = False
        for units in _choices(inputs, segments, group):
            plain = inputs.spec.sync.compression != "fp16"
            for replicas in range(1, min(len(units) // 2, batch) + 1 if plain else 2):
                if asked.replicas in (None, replicas):
                    best = _climb(inputs, segments, group.network, _slots(inputs, units, replicas))
                    found = found or best is not None
                    if best is not None:
                        yield best
            if found:
                break


def _choices(inputs: Inputs, segments: Segments, group: TrustedGroup) -> list[list[Unit]]:
    """All hosts of a group; of very many the fastest, then the roomiest. Those with the newest state come first."""
    units = [_unit(inputs, segments, node) for node in group.nodes for _ in range(ranks_of(node))]
    holding = inputs.holding

    def fast(unit: Unit) -> tuple[bool, float, str]:
        return (unit.node.node_id not in holding, unit.host.sample_s, unit.node.name)

    def roomy(unit: Unit) -> tuple[bool, float, str]:
        return (unit.node.node_id not in holding, -unit.host.budget_bytes, unit.node.name)

    if len(units) <= MOST_UNITS:
        return [sorted(units, key=fast)]
    return [sorted(sorted(units, key=key)[:MOST_UNITS], key=fast) for key in (fast, roomy)]


def _unit(inputs: Inputs, segments: Segments, node: NodeView) -> Unit:
    capacity = node.capacity
    seconds = segments.sums(cost.layer_seconds(inputs.profile, capacity))
    passes = segments.sums(cost.layer_passes(inputs.profile, capacity))
    return Unit(node, Host(seconds, cost.stretched_s(PASS_S, capacity), passes, budget_bytes(node)))


def _slots(inputs: Inputs, units: Sequence[Unit], replicas: int) -> list[tuple[Unit, ...]]:
    """Hosts of one stage in all replicas: well joined, as they average the stage's gradients, and alike in speed.

    From the fastest that is left, those whose link to it is best (within a factor of two), then the next fastest.
    """
    left, slots = list(units), []
    while len(left) >= replicas:
        first = left.pop(0)
        joined = {id(unit): link_between(inputs.cluster, first.node, unit.node) for unit in left}
        left.sort(key=lambda unit: -round(math.log2(joined[id(unit)].bytes_per_s)))
        slots.append((first, *left[: replicas - 1]))
        left = [unit for unit in units if unit in left[replicas - 1 :]]
    return slots


def _climb(inputs: Inputs, segments: Segments, network: str, slots: list[tuple[Unit, ...]]) -> PlacedEstimate | None:
    """Over the number of micro-batches: from two for each stage up until one fits, then to where the time is least."""
    replicas, nodes = len(slots[0]), inputs.spec.nodes
    counts = micro_batch_counts(inputs, inputs.spec.train.batch_size // replicas)
    alone = all(ranks_of(unit.node) == 1 for slot in slots for unit in slot)
    asked = inputs.options(StrategyName.PIPELINE_PARALLEL).stages
    most = asked or (nodes.max // replicas if alone else len(slots))
    if not counts or most < 2:
        return None
    required = frozenset(k for k, slot in enumerate(slots) if any(u.node.node_id in inputs.holding for u in slot))
    hosts, links = tuple(map(_joint, slots)), _links_of(inputs, slots)
    known: dict[int, _Counted] = {}

    def counted(index: int) -> _Counted:
        if index not in known:
            rows = math.ceil(inputs.spec.train.batch_size / replicas / counts[index])
            load = load_of(inputs, replicas, rows, counts[index], _schedule(inputs))
            question = Question(segments, hosts, links, load, most, asked or 2, required)
            known[index] = _Counted(inputs, slots, question)
        return known[index]

    def at(index: int) -> float:
        return counted(index).rough_s

    wanted = 2 * min(len(slots), segments.count)
    start = min(range(len(counts)), key=lambda index: abs(math.log(counts[index] / wanted)))
    here = next((index for index in range(start, len(counts)) if at(index) < math.inf), None)
    if here is None:
        here = next((index for index in range(start - 1, -1, -1) if at(index) < math.inf), None)
    if here is None:
        return None
    for step in (1, -1):
        while 0 <= here + step < len(counts) and at(here + step) < at(here):
            here += step
    best = counted(here).best(SLACK)
    return None if best is None else estimate(inputs, segments, network, best)


class _Counted:
    """What is possible with so many micro-batches; each chain is weighed once."""

    def __init__(self, inputs: Inputs, slots: Sequence[tuple[Unit, ...]], question: Question) -> None:
        self._inputs, self._slots, self._question = inputs, slots, question
        self._solver = Solver(question)
        self._weighed: dict[Chain, Weighed | None] = {}

    @cached_property
    def rough_s(self) -> float:
        """Of the best chain that is quick to find; infinite when there is none."""
        best = self.best(ROUGH_SLACK)
        return math.inf if best is None else best.seconds

    def best(self, slacks: Sequence[float]) -> Weighed | None:
        """Weighed exactly; None when none fits."""
        found = [weighed for chain in self._solver.chains(slacks) if (weighed := self._weigh(chain)) is not None]
        return min(found, key=lambda weighed: weighed.seconds, default=None)

    def _weigh(self, chain: Chain) -> Weighed | None:
        if chain not in self._weighed:
            load, nodes = self._question.load, self._inputs.spec.nodes
            slots = tuple(self._slots[host] for host in chain.hosts)
            shape = Shape(slots, chain.cuts, load.micro_batches, load.schedule)
            used = len({unit.node.node_id for slot in slots for unit in slot})
            fits = nodes.min <= used <= nodes.max
            self._weighed[chain] = weigh(self._inputs, self._question.segments, shape) if fits else None
        return self._weighed[chain]


def _links_of(inputs: Inputs, slots: Sequence[tuple[Unit, ...]]) -> list[list[Link]]:
    """Between two slots: the worst of the pairs that would talk."""

    def worst(a: tuple[Unit, ...], b: tuple[Unit, ...]) -> Link:
        links = [link_between(inputs.cluster, x.node, y.node) for x, y in zip(a, b, strict=True)]
        return Link(max(link.rtt_s for link in links), min(link.bytes_per_s for link in links))

    return [[worst(a, b) for b in slots] for a in slots]


def _joint(slot: tuple[Unit, ...]) -> Host:
    """One stage on several hosts, each with samples by its speed, as if it were one."""
    shares = [1 / max(unit.host.sample_s, 1e-12) for unit in slot]
    scale = len(slot) / sum(shares)
    seconds = np.max([scale * share * unit.host.seconds for share, unit in zip(shares, slot, strict=True)], axis=0)
    passes = np.max([unit.host.pass_s for unit in slot], axis=0)
    return Host(seconds, max(u.host.overhead_s for u in slot), passes, min(u.host.budget_bytes for u in slot))


def _last_reasons(inputs: Inputs, segments: Segments) -> tuple[str, ...]:
    """Why no chain works although the model can be cut: memory, in numbers, or what the job file asks for."""
    batch = inputs.spec.train.batch_size
    least = load_of(inputs, 1, 1, max(micro_batch_counts(inputs, batch), default=1), _schedule(inputs))
    table = stage_bytes(segments, least, 1)
    pieces = [float(table[k, k + 1]) for k in range(segments.count)]
    nodes = [node for group in groups(inputs) for node in group.nodes]
    roomiest = max(nodes, key=budget_bytes)
    budget = budget_bytes(roomiest)
    largest = max(range(segments.count), key=lambda k: pieces[k])
    share = f"{SHARE:.0%}"
    if pieces[largest] > budget:
        return (
            f"the piece that ends with {segments.names[largest]} needs {gib(pieces[largest])} on its own, {share} of "
            f"what {roomiest.name} grants is {gib(budget)}",
        )
    granted = max(sum(ranks_of(node) * budget_bytes(node) for node in group.nodes) for group in groups(inputs))
    whole = float(table[0, -1])
    if whole > granted:
        return (f"all stages need {gib(whole)} together, {share} of what the nodes grant is {gib(granted)}",)
    return (
        f"no cut into stages fits the memory of the nodes (the whole needs {gib(whole)}, {share} of what they grant is "
        f"{gib(granted)}) together with nodes.min, nodes.max and the options of the job",
    )
