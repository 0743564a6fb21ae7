"""One stage of a cut graph as an nn.Module that holds its part of the model under the model's own names.

A stage gets the values that cross before it and returns those that cross after it. What depends on no input is computed
again, a value for a stage further on is handed through, and the number of rows is read from the first value that comes
in. `train()` and `eval()` choose between two graphs over the same parameters and buffers.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.fx.node import map_aggregate, map_arg

from protos.errors import ErrorCode, SpecError
from strategies.cut_points_torch import Crossing, CutPoints, linear, written
from strategies.graph_torch import Held


@dataclass(frozen=True, slots=True)
class Piece:
    """The operations of one stage in one mode. Outputs are empty for the last stage: it returns the logits."""

    points: CutPoints
    start: int
    stop: int
    incoming: tuple[fx.Node, ...]
    outgoing: tuple[fx.Node, ...]  # the logits, for the last stage
    inputs: tuple[Crossing, ...]
    outputs: tuple[Crossing, ...]

    @property
    def needed(self) -> tuple[fx.Node, ...]:
        """Operations of this stage in their order, with those of earlier stages that are computed again."""
        points, order = self.points, self.points.traced.order
        given = set(self.incoming)
        waiting = [*self.outgoing]
        for group, writers in points.writers.items():
            if any(points.group(node) is group for node in points.traced.held):
                waiting += [order[i] for i in writers if self.start <= i < self.stop]
        found: set[fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if node in found or points.is_size(node):
                continue
            if node not in given and node in points.index:
                found.add(node)
                waiting += node.all_input_nodes
            # what writes into a value belongs to it: all of it when the value is computed again, here when it was sent
            first = self.start if node in points.depends else 0
            waiting += [order[i] for i in points.writers.get(points.group(node), ()) if first <= i < self.stop]
            given.add(node)
        return tuple(sorted(found, key=points.index.__getitem__))

    @property
    def held(self) -> tuple[Held, ...]:
        """What the operations use of the model."""
        table = self.points.traced.held
        used = {value for node in (*self.needed, *self.outgoing) for value in (node, *node.all_input_nodes)}
        return tuple(table[value] for value in table if value in used)


def whole(points: CutPoints) -> Piece:
    """The model in one piece."""
    traced = points.traced
    inputs = tuple(points.crossing_of(node, 0) for node in traced.inputs)
    return Piece(points, 0, len(traced.order), traced.inputs, (traced.output,), inputs, ())


def emitted(piece: Piece, last: bool, device: torch.device, mode: str) -> fx.Graph:
    """The graph of a piece. Tensors of the model are attributes under their names; device arguments name `device`."""
    return _Emitter(piece, device, mode).graph(last)


class _Emitter:
    def __init__(self, piece: Piece, device: torch.device, mode: str) -> None:
        self.piece = piece
        self.traced = piece.points.traced
        self._device = device
        self._mode = mode
        self._new = fx.Graph()
        self._made: dict[fx.Node, fx.Node] = {}
        self._rows: fx.Node | None = None
        self._needed = piece.needed

    def graph(self, last: bool) -> fx.Graph:
        for node in self.piece.incoming:
            self._made[node] = self._new.placeholder(node.name)
        self._read_rows()
        self._keep_given_whole()
        for node in self._needed:
            args = map_aggregate(map_arg(node.args, self._value), self._moved)
            kwargs = map_aggregate(map_arg(node.kwargs, self._value), self._moved)
            assert callable(node.target)
            self._made[node] = self._new.call_function(node.target, args, kwargs)
        results = tuple(self._value(node) for node in self.piece.outgoing)
        if self.traced.precision != "fp32" and not last:
            results = tuple(map(self._as_declared, results, self.piece.outputs))
        self._new.output(results[0] if last else results)
        return self._new

    def _read_rows(self) -> None:
        for node, crossing in zip(self.piece.incoming, self.piece.inputs, strict=True):
            for dimension, slope in enumerate(crossing.per_row):
                if slope and self._rows is None:
                    size = self._new.call_function(torch.ops.aten.sym_size.int, (self._made[node], dimension))
                    self._rows = size if slope == 1 else self._new.call_function(operator.floordiv, (size, slope))

    def _keep_given_whole(self) -> None:
        """What comes in is a leaf that gets a gradient: it is copied where the stage writes into it."""
        points = self.piece.points
        changed = {points.group(value) for node in self._needed for value in written(node)}
        for node in self.piece.incoming:
            if points.group(node) in changed:
                self._made[node] = self._new.call_function(torch.ops.aten.clone.default, (self._made[node],))

    def _value(self, node: fx.Node) -> Any:
        if node in self._made:
            return self._made[node]
        if self.piece.points.is_size(node):
            made = self._size(node)
        elif node in self.traced.held:
            made = self._new.get_attr(self.traced.held[node].name)
        else:
            made = self._new.get_attr(branch_name(str(node.target), self._mode))
        if isinstance(made, fx.Node):
            self._made[node] = made
        return made

    def _as_declared(self, value: fx.Node, crossing: Crossing) -> fx.Node:
        """Which operations autocast computes in half precision differs between kinds of devices: the wire does not."""
        if not crossing.dtype.is_floating_point:
            return value
        return self._new.call_function(torch.ops.aten.to.dtype, (value, crossing.dtype))

    def _size(self, node: fx.Node) -> Any:
        slope, start = linear(node.meta["val"], self.traced.rows) or (0, 0)
        value: Any = self._rows
        if slope != 1:
            value = self._new.call_function(operator.mul, (value, slope))
        return self._new.call_function(operator.add, (value, start)) if start else value

    def _moved(self, value: Any) -> Any:
        return self._device if isinstance(value, torch.device) else value


def branch_name(name: str, mode: str) -> str:
    return f"{name}_{mode}"


class StageModule(nn.Module):
    """forward(*inputs) -> tuple of outputs, or the logits for the last stage.

    Features of the first stage are given in their order, or by name. `state` has every name of `held`.
    """

    def __init__(
        self,
        held: Sequence[Held],
        same: Mapping[str, tuple[str, ...]],
        state: Mapping[str, Tensor],
        features: tuple[str, ...],
        device: torch.device,
    ) -> None:
        super().__init__()
        self._features = features
        self._forward: dict[bool, Any] = {}
        made: dict[str, Tensor] = {}
        for one in held:
            tied = next((made[name] for name in same.get(one.name, ()) if name in made), None)
            value = tied if tied is not None else self._tensor(one, state, device)
            made[one.name] = value
            _place(self, one, value)

    @staticmethod
    def _tensor(one: Held, state: Mapping[str, Tensor], device: torch.device) -> Tensor:
        value = state.get(one.name, one.value)
        if value is None or tuple(value.shape) != one.shape:
            found = "missing" if value is None else f"of shape {list(value.shape)}, not {list(one.shape)}"
            raise SpecError(f"{one.name} is {found}", "build it with the job's model", code=ErrorCode.MODEL_UNUSABLE)
        value = value.detach().to(device)
        return nn.Parameter(value, requires_grad=one.trainable) if one.kind is InputKind.PARAMETER else value

    def add_mode(self, piece: Piece, last: bool, device: torch.device) -> None:
        """The graph that runs in the mode the piece was traced in."""
        training = piece.points.traced.training
        mode = "training" if training else "evaluation"
        graph = emitted(piece, last, device, mode)
        for name, branch in piece.points.traced.branches.items():
            self.add_module(branch_name(name, mode), branch_on(branch, device))
        self._forward[training] = type(fx.GraphModule(self, graph)).forward

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        if named:
            inputs = tuple(named[name] for name in self._features)
        return self._forward[self.training](self, *inputs)


def branch_on(branch: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy of the body of an operation for one device."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(branch.graph, {}))
    for node in graph.nodes:
        moved = map_aggregate(node.kwargs, lambda value: device if isinstance(value, torch.device) else value)
        node.kwargs = dict(moved)
    return fx.GraphModule(branch, graph)


def _place(root: nn.Module, one: Held, value: Tensor) -> None:
    """Under its dotted name, in modules made for it."""
    *path, leaf = one.name.split(".")
    for part in path:
        if part not in root._modules:
            root._modules[part] = nn.Module()
        root = root.get_submodule(part)
    if isinstance(value, nn.Parameter):
        root.register_parameter(leaf, value)
    else:
        root.register_buffer(leaf, value, persistent=one.persistent)
