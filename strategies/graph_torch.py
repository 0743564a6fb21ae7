"""A model as one flat graph of operations: traced from the user's module or read from a torch.export file.

Owns the trace, what is known of each value in it (shape for any number of rows, type, gradient, what it depends on) and
the mode (training or evaluation) of the operations of a file. The number of rows is a symbol: nothing here is made for
one batch size. Refuses models that cannot be captured, with the first line of why. Names are those of the model's own
state dict; the output is what the loss compares: the logits.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from protos.errors import ErrorCode, SpecError
from strategies.graph_run_torch import Facts, watched
from strategies.loss_torch import logits_of
from strategies.weights_torch import address

Features = Tensor | Mapping[str, Tensor]
SINGLE = "features"  # the name of the input of a model that takes one tensor
TRACE_ROWS = 4  # the size the symbol has while tracing
_MODE_ARGUMENTS = ("train", "training")


class CannotTrace(SpecError):
    """The model cannot be captured as one graph; the message says why."""

    default_code = ErrorCode.MODEL_UNUSABLE


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor that the model keeps: parameter, buffer, or a constant beside them (neither in its state dict)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: InputKind
    trainable: bool = False
    persistent: bool = True
    value: Tensor | None = None  # of a constant written in the code

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class Traced:
    """One graph, of one mode. `held`: placeholders that stand for tensors of the model; `inputs`: for its features.

    `order` has every operation once, in the order they run. `same`: all names of one tensor (tied), for each of them.
    """

    graph: fx.Graph
    training: bool
    precision: str
    features: tuple[str, ...]
    inputs: tuple[fx.Node, ...]
    held: Mapping[fx.Node, Held]
    everything: tuple[Held, ...]  # also what the graph does not use, in the order of the state dict
    same: Mapping[str, tuple[str, ...]]
    order: tuple[fx.Node, ...]
    output: fx.Node
    facts: Mapping[fx.Node, Facts]
    branches: Mapping[str, fx.GraphModule]  # bodies of operations that take a function
    rows: Any  # the symbol
    calls: Mapping[str, tuple[int, int]]  # first and last operation of the first call of each module


class _Logits(nn.Module):
    """The model as a function of a list of tensors that returns the logits only."""

    def __init__(self, model: nn.Module, names: tuple[str, ...] | None) -> None:
        super().__init__()
        self.model = model
        self._names = names

    def forward(self, values: list[Tensor]) -> Tensor:
        if self._names is None:
            output = self.model(values[0])
        else:
            output = self.model(**dict(zip(self._names, values, strict=True)))
        logits = logits_of(output)
        assert isinstance(logits, Tensor)
        return logits


_PREFIX = "model."


def trace_graph(model: nn.Module, features: Features, *, training: bool, precision: str = "fp32") -> Traced:
    """Captures `model`, of fake tensors or real ones. `features` is a batch as the model gets it, of any number of
    rows: only its shapes and types are used. Raises CannotTrace."""
    names = tuple(features) if isinstance(features, Mapping) else None
    given = list(features.values()) if isinstance(features, Mapping) else [features]
    was_training = model.training
    model.train(training)
    try:
        with quiet(), _mode_of(model), _no_own_backward():
            values = [torch.zeros((TRACE_ROWS, *value.shape[1:]), dtype=value.dtype) for value in given]
            rows = Dim("rows")
            shapes = ([{0: rows} for _ in values],)
            program = torch.export.export(_Logits(model, names), (values,), dynamic_shapes=shapes, strict=False)
    except CannotTrace:
        raise
    except Exception as error:
        raise CannotTrace(f"the model cannot be traced: {_reason(error)}", HINT) from None
    finally:
        model.train(was_training)
    same = _tied(model)
    with quiet():
        return traced_program(program, names or (SINGLE,), _PREFIX, same, training, precision)


HINT = "write the forward pass without branches on the values of tensors, or use another strategy"


def traced_program(
    program: ExportedProgram,
    features: tuple[str, ...],
    prefix: str,
    same: Mapping[str, tuple[str, ...]],
    training: bool,
    precision: str,
    from_file: bool = False,
) -> Traced:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(program.graph, copies)
    output = _logits_node(program, returned)
    if from_file:
        for node in graph.nodes:
            set_mode(node, training)
    by_name = {old.name: new for old, new in copies.items() if old.op == "placeholder"}
    held, inputs = _placeholders(program, by_name, prefix, "_training" if training else "_evaluation")
    branches = {
        str(node.target): getattr(program.graph_module, str(node.target))
        for node in graph.nodes
        if node.op == "get_attr"
    }
    if not inputs or not all(has_rows(node) for node in inputs):
        raise CannotTrace("the model cannot be traced: it works with one batch size only", HINT)
    order = _in_order(graph)
    return Traced(
        graph=graph,
        training=training,
        precision=precision,
        features=features,
        inputs=inputs,
        held=held,
        everything=_everything(program, held, prefix),
        same=same,
        order=order,
        output=output,
        facts=_facts_of(graph, branches, held, precision),
        branches=branches,
        rows=inputs[0].meta["val"].shape[0].node.expr,
        calls=_calls(order, prefix),
    )


def has_rows(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 0 and isinstance(value.shape[0], torch.SymInt)


def _logits_node(program: ExportedProgram, returned: Any) -> fx.Node:
    """Which value of the graph is the logits of the model's answer."""
    nodes = list(returned)[-len(program.graph_signature.user_outputs) :] if isinstance(returned, (tuple, list)) else []
    spec = program.call_spec.out_spec
    marks = [torch.empty(0) for _ in nodes]
    logits = logits_of(pytree.tree_unflatten(marks, spec)) if spec is not None else marks[0]
    found = [node for node, mark in zip(nodes, marks, strict=True) if mark is logits]
    if not found or not isinstance(found[0], fx.Node):
        raise CannotTrace("the model cannot be traced: its output does not depend on its inputs", HINT)
    return found[0]


def _placeholders(
    program: ExportedProgram, by_name: Mapping[str, fx.Node], prefix: str, mark: str
) -> tuple[dict[fx.Node, Held], tuple[fx.Node, ...]]:
    held: dict[fx.Node, Held] = {}
    inputs: list[fx.Node] = []
    for spec in program.graph_signature.input_specs:
        node = by_name.get(getattr(spec.arg, "name", ""))
        if node is None:
            continue
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        elif spec.target is not None and isinstance(node.meta.get("val"), Tensor):
            held[node] = _held(program, spec.target, spec.kind, spec.persistent is not False, prefix, mark)
        else:
            raise CannotTrace("the model cannot be traced: it keeps objects that are not tensors", HINT)
    return held, tuple(inputs)


def _held(
    program: ExportedProgram, target: str, kind: InputKind, persistent: bool, prefix: str, mark: str = ""
) -> Held:
    """`mark` keeps constants that were written into the code apart: each trace numbers its own."""
    value = program.state_dict.get(target)
    if value is None:
        value = program.constants[target]
    known = kind is InputKind.CONSTANT_TENSOR and not isinstance(value, FakeTensor)
    return Held(
        name=target.removeprefix(prefix) + (mark if known else ""),
        shape=tuple(value.shape),
        dtype=value.dtype,
        kind=kind,
        trainable=kind is InputKind.PARAMETER and value.requires_grad,
        persistent=persistent and kind is not InputKind.CONSTANT_TENSOR,
        value=value.detach() if known else None,
    )


def _everything(program: ExportedProgram, held: Mapping[fx.Node, Held], prefix: str) -> tuple[Held, ...]:
    known = {value.name: value for value in held.values()}
    found: dict[str, Held] = {}
    for target, value in program.state_dict.items():
        kind = InputKind.PARAMETER if isinstance(value, nn.Parameter) else InputKind.BUFFER
        name = target.removeprefix(prefix)
        found[name] = known.get(name) or _held(program, target, kind, True, prefix)
    return tuple((found | known).values())


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return names_of_one(tensors | dict(model.named_buffers(remove_duplicate=False)))


def names_of_one(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(address(tensor), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def _in_order(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Operations as they run; parts taken out of a sequence come right after it, so a cut never parts them."""
    order: list[fx.Node] = []

    def add(node: fx.Node) -> None:
        order.append(node)
        for user in node.users:
            if is_part(user):
                add(user)

    for node in graph.nodes:
        if node.op == "call_function" and not is_part(node) and not _is_check(node):
            add(node)
    return tuple(order)


def is_part(node: fx.Node) -> bool:
    """Takes one value out of what an operation with several results returned."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _is_check(node: fx.Node) -> bool:
    name = str(node.target)
    return "_assert" in name or "sym_constrain_range" in name


def _calls(order: tuple[fx.Node, ...], prefix: str) -> dict[str, tuple[int, int]]:
    """Export marks the second call of a module with @1: only the first one says where its layer lies."""
    found: dict[str, tuple[int, int]] = {}
    for index, node in enumerate(order):
        stack = node.meta.get("nn_module_stack") or {}
        for key, (path, _) in stack.items():
            if "@" in key or path == key:  # a later call, or no module at all
                break
            name = path.removeprefix("L['self']").lstrip(".")
            name = "" if f"{name}." == prefix else name.removeprefix(prefix)
            first, _last = found.get(name, (index, index))
            found[name] = (first, index)
    return found


def set_mode(node: fx.Node, training: bool) -> None:
    """Dropout, normalisation and recurrent layers of a file say in an argument whether they train."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name in _MODE_ARGUMENTS and str(argument.type) == "bool":
            _set_argument(node, index, argument.name, training)
        elif argument.name == "dropout_p" and not training:
            _set_argument(node, index, argument.name, 0.0)


def _set_argument(node: fx.Node, index: int, name: str, value: bool | float) -> None:
    if index < len(node.args):
        node.args = (*node.args[:index], value, *node.args[index + 1 :])
    elif name in node.kwargs or value:
        node.kwargs = {**node.kwargs, name: value}


def _facts_of(
    graph: fx.Graph, branches: Mapping[str, fx.GraphModule], held: Mapping[fx.Node, Held], precision: str
) -> dict[fx.Node, Facts]:
    trainable = {node for node, one in held.items() if one.trainable}
    try:
        return watched(graph, branches, trainable, TRACE_ROWS, precision)
    except Exception as error:
        raise CannotTrace(f"the traced model does not run: {first_line(error)}", HINT) from None


@contextmanager
def _mode_of(model: nn.Module) -> Iterator[None]:
    """The fake world the model was built in, entered again."""
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, FakeTensor):
            with unset_fake_temporarily(), tensor.fake_mode:
                yield
            return
    with unset_fake_temporarily():
        yield


@contextmanager
def _no_own_backward() -> Iterator[None]:
    """A trace keeps the forward pass of an autograd function and would differentiate that: such models are refused."""

    def refuse(function: type, *_: Any, **__: Any) -> None:
        raise CannotTrace(
            f"the model cannot be traced: the backward pass of {function.__name__} is not in its graph",
            "a torch.autograd.Function or a backward hook keeps a model in one piece: use another strategy",
        )

    base = torch.autograd.Function
    before = base.__dict__["apply"]
    base.apply = classmethod(refuse)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        base.apply = before  # type: ignore[method-assign]


_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export")
_PLACE = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n([^\n]*)')


@contextmanager
def quiet() -> Iterator[None]:
    """What export warns about is either said in an error or of no concern to the user."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.disabled for logger in loggers]
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, disabled in zip(loggers, before, strict=True):
                logger.disabled = disabled


def _reason(error: BaseException) -> str:
    """In the words of the user's code where that is known."""
    said = first_line(error)
    if said.startswith("Constraints violated"):
        return "it works with one batch size only"
    if isinstance(error, GuardOnDataDependentSymNode):
        said = "what it does next depends on the values of a tensor"
        places = _PLACE.findall(str(error))
        if places:
            file, line, code = places[-1]
            said += f" ({Path(file).name}, line {line}: {code.strip()[:80]})"
    return said


def first_line(error: BaseException) -> str:
    """The first line that says something, of the error or of its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
