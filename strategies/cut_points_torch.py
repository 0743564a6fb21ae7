"""Where a traced graph can be cut, and what crosses there.

A cut lies between two operations that use parameters: in each such gap, the place where the fewest bytes cross. Values
that depend on no input (causal masks, positions, arithmetic on the number of rows, products of parameters alone) never
cross: the later stage computes them again. Refused, with the reason: a crossing value whose size is not proportional
to the number of rows, an integer that depends on data, a buffer written on one side and used on the other, and two
names of one storage that is written later.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from strategies.graph_torch import Held, Traced

_STATISTICS = ("running_mean", "running_var")
_MODES = ("training", "use_input_stats")


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor that goes from one stage to the next. Size of dimension d is `rows * per_row[d] + fixed[d]`."""

    name: str
    per_row: tuple[int, ...]
    fixed: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool  # its gradient comes back

    def shape(self, rows: int) -> tuple[int, ...]:
        return tuple(rows * slope + start for slope, start in zip(self.per_row, self.fixed, strict=True))

    @property
    def bytes_per_sample(self) -> float:
        return float(prod(self.shape(1)) * self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Place:
    """Between two operations: `position` is how many of them lie before. `why_not` "" where it can be cut."""

    position: int
    crossing: tuple[fx.Node, ...]
    bytes_per_sample: float = 0.0
    why_not: str = ""


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operation changes in place."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return []
    given = _arguments(node, target)
    arguments = target._schema.arguments
    names = [
        argument.name for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if any(given.get(mode) for mode in _MODES):  # its schema does not say that batch norm moves its statistics
        names += _STATISTICS
    return [value for name in names if isinstance(value := given.get(name), fx.Node)]


def _viewed(node: fx.Node) -> list[fx.Node]:
    """The arguments whose storage the result shares."""
    target = node.target
    if getattr(target, "__name__", "") == "getitem":
        return [value for value in node.args[:1] if isinstance(value, fx.Node)]
    if not isinstance(target, torch._ops.OpOverload):
        return []
    given = _arguments(node, target)
    shared = {argument.name for argument in target._schema.arguments if argument.alias_info is not None}
    if given.get("train") is False:  # dropout returns its input then
        shared.add("input")
    return [value for name in shared if isinstance(value := given.get(name), fx.Node)]


def _arguments(node: fx.Node, target: torch._ops.OpOverload) -> dict[str, Any]:
    names = [argument.name for argument in target._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


class CutPoints:
    """What can be said of every place in one graph.

    `written_elsewhere`: names of buffers that the graph of the other mode writes: they belong to one stage in both.
    """

    def __init__(self, traced: Traced, written_elsewhere: Collection[str] = ()) -> None:
        self.traced = traced
        self._written_elsewhere = written_elsewhere
        self.index = {node: number for number, node in enumerate(traced.order)}
        self._group: dict[fx.Node, fx.Node] = {}
        self.writers: dict[fx.Node, list[int]] = {}  # by group: positions of what writes into it
        for node in traced.order:
            for value in _viewed(node):
                self._join(node, value)
        for number, node in enumerate(traced.order):
            for value in written(node):
                self.writers.setdefault(self.group(value), []).append(number)
        self.live = self._live()
        self.depends = self._depends()

    def group(self, node: fx.Node) -> fx.Node:
        """One node for all that share a storage."""
        while node in self._group:
            node = self._group[node]
        return node

    def _join(self, node: fx.Node, value: fx.Node) -> None:
        own, other = self.group(node), self.group(value)
        if own is not other:
            self._group[own] = other

    def _live(self) -> set[fx.Node]:
        """What the output needs, and what writes into anything that lives on."""
        live: set[fx.Node] = set()
        waiting = [self.traced.output]
        groups = {self.group(node) for node in self.traced.held}
        waiting += [self.traced.order[i] for group in groups for i in self.writers.get(group, ())]
        while waiting:
            node = waiting.pop()
            if node in live:
                continue
            live.add(node)
            waiting += node.all_input_nodes
            waiting += [self.traced.order[i] for i in self.writers.get(self.group(node), ())]
        return live

    def _depends(self) -> set[fx.Node]:
        """Nodes whose value depends on an input, on chance or on a buffer that is written: these are sent."""
        depends: set[fx.Node] = set(self.traced.inputs)
        depends |= {node for node in self.traced.held if self.writers.get(self.group(node))}
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in self.traced.order:
            members.setdefault(self.group(node), []).append(node)
        while True:
            before = len(depends)
            for node in self.traced.order:
                if node in depends or self.is_size(node):
                    continue
                if _is_random(node) or any(value in depends for value in node.all_input_nodes):
                    depends.add(node)
            for group, writers in self.writers.items():
                if any(self.traced.order[i] in depends for i in writers):
                    depends.update((group, *members.get(group, ())))
            if len(depends) == before:
                return depends

    def is_size(self, node: fx.Node) -> bool:
        """Arithmetic on the number of rows that any stage does for itself."""
        value = node.meta.get("val")
        return isinstance(value, torch.SymInt) and linear(value, self.traced.rows) is not None

    @cached_property
    def last_use(self) -> dict[fx.Node, int]:
        last: dict[fx.Node, int] = {self.traced.output: len(self.traced.order)}
        for number, node in enumerate(self.traced.order):
            if node in self.live and not self.is_size(node):
                for value in node.all_input_nodes:
                    last[value] = max(last.get(value, number), number)
        return last

    @cached_property
    def written_names(self) -> frozenset[str]:
        return frozenset(held.name for node, held in self.traced.held.items() if node in self.depends)

    @cached_property
    def _own(self) -> Mapping[fx.Node, Held]:
        """What belongs to a place in the model: parameters, and buffers that are written in either mode."""
        buffers = self.written_names.union(self._written_elsewhere)
        return {
            node: held
            for node, held in self.traced.held.items()
            if held.kind is InputKind.PARAMETER or held.name in buffers
        }

    @cached_property
    def uses(self) -> tuple[int, ...]:
        """Positions of operations that use a parameter, or a buffer that is written."""
        own = self._own
        return tuple(
            number
            for number, node in enumerate(self.traced.order)
            if node in self.live and any(value in own for value in node.all_input_nodes)
        )

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The place of each gap: places[i] lies after uses[i] and not after uses[i + 1]. One fewer than uses."""
        found = []
        for first, last in zip(self.uses, self.uses[1:], strict=False):
            here = self.sweep[first + 1 : last + 1]
            possible = [place for place in here if not place.why_not]
            fewest = min((place.bytes_per_sample for place in possible), default=0.0)
            found.append(next((p for p in reversed(possible) if p.bytes_per_sample == fewest), here[0]))
        return tuple(found)

    @cached_property
    def sweep(self) -> tuple[Place, ...]:
        """Every place: sweep[position]."""
        return tuple(self._walk())

    def _walk(self) -> Iterator[Place]:
        active: dict[fx.Node, int] = {n: self.last_use.get(n, -1) for n in self.traced.inputs}
        spans = self._written_spans()
        for position in range(len(self.traced.order) + 1):
            if position:
                node = self.traced.order[position - 1]
                if node in self.depends and node in self.live:
                    active[node] = self.last_use.get(node, -1)
            active = {node: last for node, last in active.items() if last >= position}
            yield self._place(position, tuple(active), spans)

    def _place(self, position: int, crossing: tuple[fx.Node, ...], spans: Mapping[str, tuple[int, int]]) -> Place:
        why = ""
        for name, (first, last) in spans.items():
            if first < position <= last:
                why = why or f"{name} is written on one side and used on the other"
        groups: set[fx.Node] = set()
        for node in crossing:
            why = why or self._why_not_sent(node)
            group = self.group(node)
            later = any(writer >= position for writer in self.writers.get(group, ()))
            if group in groups and later:
                why = why or f"{node.name} shares memory with another value that crosses and is written later"
            groups.add(group)
        if not any(isinstance(node.meta.get("val"), Tensor) for node in crossing):
            why = why or "nothing crosses that tells the number of rows"
        size = 0.0 if why else sum(self.crossing_of(node, position).bytes_per_sample for node in crossing)
        return Place(position, crossing, size, why)

    def _why_not_sent(self, node: fx.Node) -> str:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
            return f"{node.name} is a number that depends on data"
        if not isinstance(value, Tensor):
            return f"{node.name} is not a tensor"
        if value.layout != torch.strided:
            return f"{node.name} is not a dense tensor"
        sizes = [linear(size, self.traced.rows) for size in value.shape]
        if any(size is None for size in sizes):
            return f"the shape of {node.name} depends on data"
        growing = [size for size in sizes if size is not None and size[0]]
        if len(growing) != 1 or growing[0][0] < 0 or growing[0][1]:
            return f"{node.name} of shape {[str(size) for size in value.shape]} has no batch dimension"
        return ""

    def crossing_of(self, node: fx.Node, position: int) -> Crossing:
        value = node.meta["val"]
        sizes = [linear(size, self.traced.rows) or (0, 0) for size in value.shape]
        facts = self.traced.facts[node]
        writers = [i for i in self.writers.get(self.group(node), ()) if i < position]
        flows = facts.requires_grad or any(
            self.traced.facts[self.traced.order[i]].requires_grad
            for i in writers
            if self.traced.order[i] in self.traced.facts
        )
        slopes, starts = tuple(a for a, _ in sizes), tuple(b for _, b in sizes)
        return Crossing(node.name, slopes, starts, facts.dtype, flows and facts.dtype.is_floating_point)

    def _written_spans(self) -> dict[str, tuple[int, int]]:
        """First and last use of each buffer that some operation writes."""
        spans: dict[str, tuple[int, int]] = {}
        written_groups = {self.group(node): held for node, held in self.traced.held.items() if node in self.depends}
        for number, node in enumerate(self.traced.order):
            for value in node.all_input_nodes if node in self.live else ():
                held = written_groups.get(self.group(value))
                if held is not None:
                    first, _ = spans.get(held.name, (number, number))
                    spans[held.name] = (first, number)
        return spans

    def gap_after(self, layer: str) -> int | None:
        """The number of the last of `uses` that is not after the layer's first call; None: not in the graph."""
        call = self.traced.calls.get(layer)
        return None if call is None else bisect_right(self.uses, call[1]) - 1

    def first_uses(self) -> dict[str, int]:
        """Of each parameter and written buffer: the number, among `uses`, of the operation that uses it first."""
        found: dict[str, int] = {}
        for number, use in enumerate(self.uses):
            for value in self.traced.order[use].all_input_nodes:
                if value in self._own:
                    found.setdefault(self._own[value].name, number)
        return found


def linear(size: Any, rows: Any) -> tuple[int, int] | None:
    """(a, b) for a size of a * rows + b; None for any other."""
    if isinstance(size, int):
        return 0, size
    if not isinstance(size, torch.SymInt):
        return None
    expression = size.node.expr
    if expression.free_symbols - {rows}:
        return None
    start, slope = expression.subs(rows, 0), expression.diff(rows)
    if not (start.is_Integer and slope.is_Integer):
        return None
    return int(slope), int(start)


def _is_random(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def last_module(name: str) -> str:
    """Of joined layers ("first..last") the last."""
    return name.rpartition("..")[2]
