"""An ONNX file as plain values: nodes, tensors by name, types of inputs and outputs; no number of a weight is read.

Owns the field numbers of onnx.proto (ir_version 3 to 13) and the check that a tensor's bytes are what its dimensions
say, wherever they lie. Small integer tensors, which say how shapes change, are the only contents that are kept. Data in
other files are never opened: their names must stay inside the directory of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from coordinator.identify.protobuf_wire import Field, Message, Wire, open_message
from coordinator.identify.tensors import MAX_NAME_CHARACTERS, check_shape, unusable

MAX_NODES = 500_000
MAX_GRAPH_DEPTH = 12
KEPT_INTEGERS = 64
DTYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 8: "STRING", 9: "BOOL", 10: "F16", 11: "F64",
    12: "U32", 13: "U64", 14: "C64", 15: "C128", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ", 19: "F8_E5M2",
    20: "F8_E5M2FNUZ", 21: "U4", 22: "I4", 23: "F4", 24: "F8_E8M0", 25: "U2", 26: "I2",
}  # fmt: skip
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "C128": 128, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16,
    "I16": 16, "U16": 16, "U4": 4, "I4": 4, "F4": 4, "U2": 2, "I2": 2,
}  # fmt: skip
_AGAIN = "the file is damaged or was cut short: copy it again or export the model again"
_MOVE = "write the model again with its data in a file beside it, or in one file"
_EXTERNAL = 1


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    values: tuple[int, ...] | None = None  # of small integer tensors
    external: str = ""  # the file that holds its data
    missing: bool = False  # it has dimensions and no data at all
    made: bool = False  # ConstantOfShape: filled when the model starts, not stored

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return -(-self.elements * BITS.get(self.dtype, 8) // 8)


Attribute = int | float | str | tuple[int, ...] | OnnxTensor


@dataclass(slots=True)
class Node:
    name: str = ""
    kind: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, Attribute] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)  # of attributes that are lists of numbers
    graphs: list[Graph] = field(default_factory=list)

    def integer(self, name: str, default: int) -> int:
        value = self.attributes.get(name, default)
        return value if isinstance(value, int) else default

    def integers(self, name: str) -> tuple[int, ...] | None:
        value = self.attributes.get(name)
        return value if isinstance(value, tuple) else None


Dimension = int | str  # a number, or the name of one that is not fixed ("" when it has none)


@dataclass(slots=True)
class Value:
    """An input, an output or a value between: its type, and its dimensions where the file says them."""

    name: str
    dtype: str = ""
    dimensions: tuple[Dimension, ...] | None = None


@dataclass(slots=True)
class Graph:
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, OnnxTensor] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)

    def everywhere(self) -> Iterator[Graph]:
        """This graph and those inside its nodes."""
        yield self
        for node in self.nodes:
            for graph in node.graphs:
                yield from graph.everywhere()


@dataclass(slots=True)
class OnnxModel:
    ir_version: int = 0
    producer: str = ""
    operators: dict[str, int] = field(default_factory=dict)  # domain -> version
    graph: Graph | None = None
    functions: list[Graph] = field(default_factory=list)
    function_names: set[str] = field(default_factory=set)


def read_model(file: BinaryIO, size: int) -> OnnxModel:
    """Raises SpecError for what is damaged, hostile or no ONNX model."""
    model = OnnxModel()
    budget = _Budget()
    for entry in open_message(file, size):
        match entry.number:
            case 1:
                model.ir_version = entry.unsigned
            case 2:
                model.producer = f"{entry.text()} {model.producer}".strip()
            case 3:
                model.producer = f"{model.producer} {entry.text()}".strip()
            case 7:
                if model.graph is not None:
                    raise unusable("the ONNX file holds two graphs", _AGAIN)
                model.graph = _graph(entry.message(), budget, 0)
            case 8:
                domain, version = "", 0
                for part in entry.message():
                    domain = part.text() if part.number == 1 else domain
                    version = part.signed if part.number == 2 else version
                model.operators[domain] = version
            case 25:
                _function(entry.message(), model, budget)
    if model.graph is None or not model.operators:
        raise unusable("the ONNX file has no graph or no operator set", _AGAIN)
    return model


@dataclass(slots=True)
class _Budget:
    nodes: int = 0

    def node(self) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise unusable(f"the ONNX file has more than {MAX_NODES} nodes", _AGAIN)


def _function(message: Message, model: OnnxModel, budget: _Budget) -> None:
    body = Graph()
    for entry in message:
        if entry.number == 1:
            model.function_names.add(_name(entry))
        elif entry.number == 7:
            body.nodes.append(_node(entry.message(), budget, 0))
    model.functions.append(body)


def _graph(message: Message, budget: _Budget, depth: int) -> Graph:
    if depth > MAX_GRAPH_DEPTH:
        raise unusable(f"the ONNX graph holds graphs more than {MAX_GRAPH_DEPTH} deep", _AGAIN)
    graph = Graph()
    for entry in message:
        match entry.number:
            case 1:
                graph.nodes.append(_node(entry.message(), budget, depth))
            case 5 | 15:
                budget.node()
                tensor = _tensor(entry.message()) if entry.number == 5 else _sparse(entry.message())
                if tensor.name in graph.tensors:
                    raise unusable(f"the ONNX file names the tensor {tensor.name[:80]!r} twice", _AGAIN)
                graph.tensors[tensor.name] = tensor
            case 11:
                graph.inputs.append(_value(entry.message()))
            case 12:
                graph.outputs.append(_value(entry.message()))
            case 13:
                graph.values.append(_value(entry.message()))
    return graph


def _node(message: Message, budget: _Budget, depth: int) -> Node:
    budget.node()
    node = Node()
    for entry in message:
        match entry.number:
            case 1:
                node.inputs.append(_name(entry))
            case 2:
                node.outputs.append(_name(entry))
            case 3:
                node.name = _name(entry)
            case 4:
                node.kind = _name(entry)
            case 5:
                _attribute(entry.message(), node, budget, depth)
            case 7:
                node.domain = _name(entry)
    return node


def _attribute(message: Message, node: Node, budget: _Budget, depth: int) -> None:
    name, length = "", 0
    value: Attribute | None = None
    integers: list[int] = []
    for entry in message:
        match entry.number:
            case 1:
                name = _name(entry)
            case 2:
                value = entry.real
            case 3:
                value = entry.signed
            case 4 if entry.length <= MAX_NAME_CHARACTERS:
                value = entry.text()
            case 5:
                value = _tensor(entry.message())
            case 6 | 11:
                node.graphs.append(_graph(entry.message(), budget, depth + 1))
            case 7:
                length += 1 if entry.wire is not Wire.SPAN else entry.length // 4
            case 8:
                count = entry.number_of_integers()
                length += count
                if length <= KEPT_INTEGERS:
                    integers += entry.integers(KEPT_INTEGERS)
    if integers and len(integers) == length:
        value = tuple(integers)
    if length:
        node.lengths[name] = length
    if value is not None:
        node.attributes[name] = value


def _tensor(message: Message) -> OnnxTensor:
    name, dtype, location = "", "", 0
    dims: list[int] = []
    places: dict[str, str] = {}
    data: list[Field] = []
    for entry in message:
        match entry.number:
            case 1:
                dims += entry.integers(64)
            case 2:
                dtype = DTYPES.get(entry.unsigned, "")
            case 8:
                name = _name(entry)
            case 4 | 5 | 6 | 7 | 9 | 10 | 11:
                if entry.number == 6 or entry.length or entry.wire is not Wire.SPAN:
                    if entry.number == 6 or (data and entry.wire is not Wire.SPAN):  # counted, not kept
                        data = data or [entry]
                    else:
                        data.append(entry)
            case 13:
                key, place = "", ""
                for part in entry.message():
                    key = part.text() if part.number == 1 else key
                    place = part.text() if part.number == 2 else place
                places[key] = place
            case 14:
                location = entry.unsigned
    if not dtype:
        raise unusable(f"the ONNX tensor {name[:80]!r} has an unknown type", _AGAIN)
    shape = check_shape(name, dims)
    tensor = OnnxTensor(name, dtype, shape)
    if location == _EXTERNAL or places:
        return OnnxTensor(name, dtype, shape, external=_external(tensor, places))
    missing = not data and tensor.elements > 0 and dtype != "STRING"
    return OnnxTensor(name, dtype, shape, _checked_values(tensor, data), missing=missing)


def _checked_values(tensor: OnnxTensor, data: list[Field]) -> tuple[int, ...] | None:
    """The numbers of a small integer tensor; raises SpecError when the data are not what the dimensions say."""
    raw = [entry for entry in data if entry.number == 9]
    if raw and (len(data) != 1 or raw[0].length != tensor.bytes):
        raise unusable(
            f"the ONNX tensor {tensor.name[:80]!r} lists {tensor.bytes} bytes, the file has {raw[0].length}", _AGAIN
        )
    if tensor.dtype not in ("I64", "I32") or tensor.elements > KEPT_INTEGERS or not data:
        return None
    if raw:
        width = BITS[tensor.dtype] // 8
        content = raw[0].content(width * KEPT_INTEGERS)
        pieces = (content[at : at + width] for at in range(0, len(content), width))
        return tuple(int.from_bytes(piece, "little", signed=True) for piece in pieces)
    if len(data) != 1:
        return None
    values = data[0].integers(KEPT_INTEGERS)
    return tuple(values) if len(values) == tensor.elements else None


def _external(tensor: OnnxTensor, places: dict[str, str]) -> str:
    """The name of the file that holds the data; raises SpecError for one that leaves the model's directory."""
    location = places.get("location", "")
    parts = location.replace("\\", "/").split("/")
    inside = location and "\0" not in location and ":" not in parts[0] and not {"", ".", ".."} & set(parts)
    if not inside or len(location) > MAX_NAME_CHARACTERS:
        raise unusable(
            f"the ONNX tensor {tensor.name[:80]!r} lies in {location[:80]!r}, outside the directory of the model", _MOVE
        )
    for key in ("offset", "length"):
        text = places.get(key, "")
        if text and not (text.isascii() and text.isdigit() and len(text) < 20):
            raise unusable(f"the ONNX tensor {tensor.name[:80]!r} has the impossible {key} {text[:40]!r}", _AGAIN)
    if places.get("length") and int(places["length"]) != tensor.bytes:
        raise unusable(
            f"the ONNX tensor {tensor.name[:80]!r} needs {tensor.bytes} bytes, its place has {places['length']}", _AGAIN
        )
    return location


def _sparse(message: Message) -> OnnxTensor:
    """A sparse tensor counts what it stores."""
    found = OnnxTensor("", "F32", (0,))
    for entry in message:
        if entry.number == 1:
            found = _tensor(entry.message())
    return found


def _value(message: Message) -> Value:
    value = Value("")
    for entry in message:
        if entry.number == 1:
            value.name = _name(entry)
        elif entry.number == 2:
            for kind in entry.message():
                if kind.number == 1:
                    _tensor_type(kind.message(), value)
    return value


def _tensor_type(message: Message, value: Value) -> None:
    for entry in message:
        if entry.number == 1:
            value.dtype = DTYPES.get(entry.unsigned, "")
        elif entry.number == 2:
            dimensions: list[Dimension] = []
            for each in entry.message():
                if each.number == 1:
                    dimensions.append(_dimension(each.message()))
                if len(dimensions) > 64:
                    raise unusable(f"{value.name[:80]!r} has more than 64 dimensions", _AGAIN)
            value.dimensions = tuple(dimensions)


def _dimension(message: Message) -> Dimension:
    found: Dimension = ""
    for entry in message:
        if entry.number == 1:
            found = entry.signed if 0 <= entry.signed < 1 << 48 else ""
        elif entry.number == 2:
            found = entry.text()
    return found


def _name(entry: Field) -> str:
    return entry.text(4 * MAX_NAME_CHARACTERS)
