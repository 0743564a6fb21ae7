"""A TensorFlow saved_model.pb as plain values: operators, variables, signatures, names of functions and classes.

Owns the field numbers of saved_model.proto, meta_graph.proto, graph.proto and saved_object_graph.proto. Constants,
which may be large, are stepped over; nothing is run and no other file is opened.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import BinaryIO

from coordinator.identify.protobuf_wire import Field, Message, open_message
from coordinator.identify.tensor_bundle import DTYPES, dimensions
from coordinator.identify.tensors import MAX_NAME_CHARACTERS, unusable

MAX_NODES = 500_000
MAX_WORDS = 20_000
_VARIABLES = ("VarHandleOp", "VariableV2", "Variable")
_TRAINABLE = "trainable_variables"
_OPTIMIZER_CHILDREN = ("optimizer", "_optimizer", "keras_api", "signatures")
_AGAIN = "the SavedModel is damaged or was cut short: copy the directory again"


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of an input or output. `shape` is None when its rank is open; -1 is an open size."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None


@dataclass(slots=True)
class Signature:
    name: str
    method: str = ""
    inputs: dict[str, TensorType] = field(default_factory=dict)
    outputs: dict[str, TensorType] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GraphVariable:
    name: str
    dtype: str
    shape: tuple[int, ...] | None
    trainable: bool


@dataclass(slots=True)
class _Object:
    """A node of the graph of Python objects that were saved."""

    children: list[tuple[int, str]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    variable: GraphVariable | None = None


@dataclass(slots=True)
class SavedGraph:
    writer: str = ""  # the version of TensorFlow
    tags: list[str] = field(default_factory=list)
    nodes: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    words: list[str] = field(default_factory=list)  # names of functions and classes
    signatures: list[Signature] = field(default_factory=list)
    declared: dict[str, GraphVariable] = field(default_factory=dict)  # variables that are operators of the graph
    trainable: set[str] = field(default_factory=set)  # their names, where a collection lists them
    objects: list[_Object] = field(default_factory=list)

    def object_variables(self) -> list[GraphVariable]:
        """Variables that the saved object reaches without its optimizer, each once."""
        slots = {number for each in self.objects for number in each.slots}
        found, seen, todo = [], {0}, [0]
        while todo:
            here = todo.pop()
            if here >= len(self.objects):
                continue
            each = self.objects[here]
            if each.variable is not None and here not in slots:
                found.append(each.variable)
            for number, name in each.children:
                if number not in seen and name not in _OPTIMIZER_CHILDREN:
                    seen.add(number)
                    todo.append(number)
        return found


def read_graph(file: BinaryIO, size: int) -> SavedGraph:
    """Raises SpecError for what is damaged, hostile or no SavedModel. Of several graphs the first is read."""
    graph = SavedGraph()
    seen = 0
    for entry in open_message(file, size):
        if entry.number == 2:
            seen += 1
            if seen == 1:
                _meta_graph(entry.message(), graph)
    if not seen:
        raise unusable("saved_model.pb holds no graph", _AGAIN)
    return graph


def _meta_graph(message: Message, graph: SavedGraph) -> None:
    for entry in message:
        match entry.number:
            case 1:
                for part in entry.message():
                    if part.number == 4:
                        graph.tags.append(_name(part))
                    elif part.number == 5:
                        graph.writer = _name(part)
            case 2:
                _graph_def(entry.message(), graph)
            case 4:
                _collection(entry.message(), graph)
            case 5:
                graph.signatures.append(_signature(entry.message()))
            case 7:
                for part in entry.message():
                    if part.number == 1:
                        graph.objects.append(_object(part.message(), graph))


def _graph_def(message: Message, graph: SavedGraph) -> None:
    for entry in message:
        if entry.number == 1:
            _node(entry.message(), graph)
        elif entry.number == 2:
            for part in entry.message():
                if part.number == 1:
                    _function(part.message(), graph)


def _function(message: Message, graph: SavedGraph) -> None:
    for entry in message:
        if entry.number == 1:
            for part in entry.message():
                if part.number == 1:
                    _word(part, graph)
        elif entry.number == 3:
            _node(entry.message(), graph)


def _node(message: Message, graph: SavedGraph) -> None:
    name = operator = ""
    attributes: list[Field] = []
    for entry in message:
        match entry.number:
            case 1:
                name = _name(entry)
            case 2:
                operator = _name(entry)
            case 5:
                attributes.append(entry)
    graph.operators[operator] += 1
    graph.nodes += 1
    if graph.nodes > MAX_NODES:
        raise unusable(f"saved_model.pb has more than {MAX_NODES} nodes", _AGAIN)
    if operator in _VARIABLES and name:
        dtype, shape = "", None
        for attribute in attributes:
            key, value = _entry(attribute.message())
            for part in value or ():
                if key == "dtype" and part.number == 6:
                    dtype = DTYPES.get(part.unsigned % 100, "")
                elif key == "shape" and part.number == 7:
                    shape = _shape(part.message())
        graph.declared[name] = GraphVariable(name, dtype, shape, False)


def _collection(message: Message, graph: SavedGraph) -> None:
    key, value = _entry(message)
    if key != _TRAINABLE:
        return
    for kind in value or ():
        if kind.number != 2:  # VariableDef messages, as bytes
            continue
        for each in kind.message():
            for part in each.message():
                if part.number == 1:
                    graph.trainable.add(_name(part).partition(":")[0])


def _signature(message: Message) -> Signature:
    key, value = _entry(message)
    signature = Signature(key)
    for part in value or ():
        if part.number in (1, 2):
            name, kind = _entry(part.message())
            if kind is not None and len(signature.inputs) + len(signature.outputs) < 4096:
                (signature.inputs if part.number == 1 else signature.outputs)[name] = _tensor_type(kind)
        elif part.number == 3:
            signature.method = _name(part)
    return signature


def _tensor_type(message: Message) -> TensorType:
    name, dtype, shape = "", "", None
    for entry in message:
        match entry.number:
            case 1:
                name = _name(entry)
            case 2:
                dtype = DTYPES.get(entry.unsigned % 100, "")
            case 3:
                shape = _shape(entry.message())
    return TensorType(name, dtype, shape)


def _object(message: Message, graph: SavedGraph) -> _Object:
    found = _Object()
    for entry in message:
        match entry.number:
            case 1:
                number, name = 0, ""
                for part in entry.message():
                    number = part.unsigned if part.number == 1 else number
                    name = _name(part) if part.number == 2 else name
                found.children.append((number, name))
            case 3:
                found.slots += [part.unsigned for part in entry.message() if part.number == 3]
            case 4:
                for part in entry.message():
                    if part.number == 1:
                        _word(part, graph)
            case 7:
                found.variable = _variable(entry.message())
    return found


def _variable(message: Message) -> GraphVariable:
    name, dtype, trainable = "", "", False
    shape: tuple[int, ...] | None = ()
    for entry in message:
        match entry.number:
            case 1:
                dtype = DTYPES.get(entry.unsigned % 100, "")
            case 2:
                shape = _shape(entry.message())
            case 3:
                trainable = bool(entry.unsigned)
            case 6:
                name = _name(entry)
    return GraphVariable(name, dtype, shape, trainable)


def _shape(message: Message) -> tuple[int, ...] | None:
    for entry in message:
        if entry.number == 3 and entry.unsigned:
            return None
    found = tuple(dimensions(message))
    if len(found) > 64 or not all(-1 <= size < 1 << 48 for size in found):
        raise unusable("saved_model.pb has an impossible shape", _AGAIN)
    return found


def _entry(message: Message) -> tuple[str, Message | None]:
    """The key and the value of an entry of a map."""
    key, value = "", None
    for entry in message:
        if entry.number == 1:
            key = _name(entry)
        elif entry.number == 2:
            value = entry.message()
    return key, value


def _word(entry: Field, graph: SavedGraph) -> None:
    if len(graph.words) < MAX_WORDS:
        graph.words.append(_name(entry))


def _name(entry: Field) -> str:
    return entry.text(8 * MAX_NAME_CHARACTERS)
