"""The graph of a torch.export program as plain values, and what its operators compute.

Owns the JSON schema (version 8) as far as it is needed: sizes of all values, which inputs are parameters, the operators
with their tensors and the modules they belong to. Raises KeyError and its like for another schema; the caller decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coordinator.identify.layers import Layer
from coordinator.identify.tensors import MAX_TENSORS, check_shape, unusable

MAX_NODES = 500_000
_MAX_DEPTH = 8
DTYPES = {
    1: "U8", 2: "I8", 3: "I16", 4: "I32", 5: "I64", 6: "F16", 7: "F32", 8: "F64", 9: "C32", 10: "C64", 11: "C128",
    12: "BOOL", 13: "BF16", 28: "U16", 29: "F8_E4M3", 30: "F8_E5M2", 31: "F8_E4M3FNUZ", 32: "F8_E5M2FNUZ",
    33: "F8_E8M0", 34: "U32", 35: "U64",
}  # fmt: skip
ITEM_BYTES = {
    "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "F32": 4, "F64": 8, "C32": 4, "C64": 8, "C128": 16,
    "BOOL": 1, "BF16": 2, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
_PRODUCTS = {"linear": 0, "mm": 0, "bmm": 0, "matmul": 0, "addmm": 1, "baddbmm": 1}
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_RUNS_ONCE = ("wrap_with_set_grad_enabled", "wrap_with_autocast")  # the graph in it was walked
_NO_RULE = ("einsum", "tensordot", "bilinear", "cdist")
_VIEW_WORDS = """
    view reshape transpose permute t squeeze unsqueeze select slice expand flatten unflatten detach alias chunk split
    split_with_sizes unbind narrow as_strided contiguous sym_size _assert_tensor_metadata dropout
"""
_VIEWS = frozenset(_VIEW_WORDS.split())
_SAYS_NOTHING = _VIEWS | {"to", "_to_copy", "clone"}


@dataclass(frozen=True, slots=True)
class Value:
    dtype: str
    shape: tuple[int, ...]
    fixed: tuple[bool, ...]  # per dimension: False where it is an expression

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Call:
    """An operator with the names of its tensors, and the path of the module that it belongs to."""

    target: str
    inputs: tuple[tuple[str, ...], ...]  # per argument that holds tensors
    outputs: tuple[str, ...]
    module: str

    @property
    def operator(self) -> str:
        parts = self.target.split(".")
        return parts[3] if parts[:2] == ["torch", "ops"] and len(parts) > 3 else parts[-1]


@dataclass(slots=True)
class ExportedGraph:
    values: dict[str, Value] = field(default_factory=dict)
    parameters: dict[str, Value] = field(default_factory=dict)
    nodes: list[Call] = field(default_factory=list)
    classes: dict[str, str] = field(default_factory=dict)  # path of a module -> its class
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    @property
    def first(self) -> Value | None:
        return next((self.values[name] for name in self.inputs if name in self.values), None)

    @property
    def batch(self) -> int:
        """How many samples the example had."""
        return max(self.first.shape[0], 1) if self.first is not None and self.first.shape else 1

    @property
    def batch_text(self) -> str:
        return (
            "of any size" if self.first and self.first.fixed and not self.first.fixed[0] else f"fixed to {self.batch}"
        )

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        first = self.first
        return first.shape[1:] if first is not None and all(first.fixed[1:]) else None

    def task(self) -> str:
        """What the last operator says about the head."""
        made_by = {name: node for node in self.nodes for name in node.outputs}
        node = made_by.get(self.outputs[0]) if self.outputs else None
        for _ in range(8):
            if node is None or node.operator not in _SAYS_NOTHING or not node.inputs or not node.inputs[0]:
                break
            node = made_by.get(node.inputs[0][0])
        says = node is not None and node.operator in ("softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid")
        return "classification" if says else ""

    def measure(self, layers: Mapping[str, Layer]) -> tuple[bool, bool]:
        """Writes FLOPs and activations of one sample into the layers; whether all of either are known.

        An activation is what an operator makes anew; it is counted at the layer of its module, or at the last one.
        """
        if not layers or any(not all(self.values[name].fixed[1:]) for name in self.inputs if name in self.values):
            return False, False
        known, batch = True, self.batch
        current = next(iter(layers.values()))
        for node in self.nodes:
            current = _layer_of(node.module, layers) or current
            flops = self._flops(node)
            known = known and flops is not None
            current.flops += (flops or 0.0) / batch
            if node.operator in _VIEWS or "higher_order" in node.target:
                continue
            for name in node.outputs:
                value = self.values.get(name)
                if value is None:
                    continue
                made = value.elements * ITEM_BYTES.get(value.dtype, 1) / batch
                current.activation_bytes += made
                current.output_bytes, current.output_shape = made, value.shape[1:]
        return known, True

    def _flops(self, node: Call) -> float | None:
        """Of the products of one call with the example's batch; None when there is no rule for it."""
        name = node.operator
        if name in _NO_RULE:
            return None
        if "higher_order" in node.target:
            return 0.0 if node.target.endswith(_RUNS_ONCE) else None
        shapes = [[self.values[each].shape for each in group if each in self.values] for group in node.inputs]
        made = self.values.get(node.outputs[0]) if node.outputs else None
        try:
            if name in _PRODUCTS and made is not None:
                return 2.0 * made.elements * shapes[_PRODUCTS[name]][0][-1]
            if name in _CONVOLUTIONS and made is not None:
                return 2.0 * made.elements * math.prod(shapes[1][0][1:])
            if name in _TRANSPOSED:
                return 2.0 * math.prod(shapes[0][0]) * math.prod(shapes[1][0][1:])
            if name in _RECURRENT:
                steps = math.prod(shapes[0][0][:-1])
                weights = [shape for group in shapes[1:] for shape in group if len(shape) == 2]
                return 2.0 * steps * sum(map(math.prod, weights))
            if "scaled_dot_product" in name:
                query, key, value = shapes[0][0], shapes[1][0], shapes[2][0]
                return 2.0 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
        except IndexError:
            return None
        return 0.0


def read_graph(program: Any) -> ExportedGraph:
    """From the parsed JSON. Raises KeyError, TypeError, ValueError or AttributeError for another schema."""
    module = program["graph_module"]
    graph = ExportedGraph()
    _add(module["graph"], "", graph, 0)
    for spec in module["signature"]["input_specs"]:
        if "parameter" in spec:
            inside = spec["parameter"]
            graph.parameters[str(inside["parameter_name"])] = graph.values[inside["arg"]["name"]]
        elif "user_input" in spec:
            name = _tensor_name(spec["user_input"]["arg"])
            graph.inputs += [name] if name else []
    for spec in module["signature"]["output_specs"]:
        if "user_output" in spec:
            name = _tensor_name(spec["user_output"]["arg"])
            graph.outputs += [name] if name else []
    if len(graph.parameters) > MAX_TENSORS:
        raise unusable(f"the program has more than {MAX_TENSORS} parameters")
    return graph


def _add(document: Any, inside: str, graph: ExportedGraph, depth: int) -> None:
    """The values and operators of one graph; those of a graph inside another go by names that start with `inside`."""
    if depth > _MAX_DEPTH or len(graph.nodes) > MAX_NODES or len(graph.values) > 4 * MAX_NODES:
        raise unusable("the program has too many operators, or graphs inside graphs", "export a smaller part of it")
    for name, meta in document["tensor_values"].items():
        graph.values[inside + name] = read_value(name, meta)
    for node in document["nodes"]:
        for entry in node["inputs"]:
            if "as_graph" in entry["arg"]:
                within = entry["arg"]["as_graph"]
                _add(within["graph"], f"{inside}{len(graph.nodes)}/", graph, depth + 1)
        graph.nodes.append(_call(node, inside, graph.classes))


def read_value(name: str, meta: Any) -> Value:
    """The type and sizes of one tensor, as the schema writes them everywhere."""
    sizes, fixed = [], []
    for size in meta["sizes"]:
        if "as_int" in size:
            sizes.append(size["as_int"])
        else:
            hint = size["as_expr"].get("hint")
            sizes.append(hint["as_int"] if hint else 1)
        fixed.append("as_int" in size)
    return Value(DTYPES.get(meta["dtype"], "unknown"), check_shape(name, sizes), tuple(fixed))


def _call(node: Any, inside: str, classes: dict[str, str]) -> Call:
    inputs = (tuple(inside + name for name in _tensor_names(entry["arg"])) for entry in node["inputs"])
    outputs = tuple(inside + name for entry in node["outputs"] for name in _tensor_names(entry))
    path = ""
    for part in str((node.get("metadata") or {}).get("nn_module_stack", "")).split(";"):
        key, _, rest = part.partition(",")
        here, _, kind = rest.rpartition(",")
        if key:
            path = here.partition("@")[0]
            classes[path] = kind
    return Call(str(node["target"]), tuple(names for names in inputs if names), outputs, path)


def _tensor_name(argument: Any) -> str:
    names = _tensor_names(argument)
    return names[0] if len(names) == 1 else ""


def _tensor_names(argument: Any) -> tuple[str, ...]:
    """Of one argument: a tensor, a list of them, or something else."""
    if "as_tensor" in argument:
        return (str(argument["as_tensor"]["name"]),)
    if "as_tensors" in argument:
        return tuple(str(each["name"]) for each in argument["as_tensors"])
    if "as_optional_tensors" in argument:
        found = (each.get("as_tensor") for each in argument["as_optional_tensors"])
        return tuple(str(each["name"]) for each in found if each)
    return ()


def _layer_of(path: str, layers: Mapping[str, Layer]) -> Layer | None:
    """The layer of a module or of the nearest module around it that has parameters; the outermost only for its own."""
    while path and path not in layers:
        path = path.rpartition(".")[0]
    return layers.get(path) if path else None
