"""The layers of an ONNX graph: which nodes they are, which tensors are their parameters, how many FLOPs they need.

A parameter is a number that training would change: floating-point tensors and quantised weights, by the place where an
operator takes them; not shapes, bounds, scales, zero points, running statistics or single constants. What an exporter
folded (a batch norm into a convolution) is gone and is not counted. FLOPs are those of products (2 per multiply-add).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from coordinator.identify.layers import Layer
from coordinator.identify.onnx_graph import Graph, Node, OnnxModel, OnnxTensor
from coordinator.identify.onnx_shapes import WEIGHTS_AT, Shape, Shapes

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F4")
_THROUGH = frozenset({"Cast", "Transpose", "DequantizeLinear", "Identity", "Reshape", "Squeeze", "Unsqueeze",
                      "Flatten", "Slice", "Split", "Expand"})  # fmt: skip
# where an operator takes weights: what it takes elsewhere is a setting
_WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (1, 2), "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2), "LayerNormalization": (1, 2), "GroupNormalization": (1, 2),
    "SimplifiedLayerNormalization": (1,), "RMSNormalization": (1,), "PRelu": (1,), "LSTM": (1, 2, 3, 7),
    "GRU": (1, 2, 3), "RNN": (1, 2, 3), "ConvInteger": (1,), "QLinearConv": (3, 8), "QLinearMatMul": (0, 3),
    "MatMulInteger": (0, 1), "DynamicQuantizeMatMul": (1,), "MatMulIntegerToFloat": (1,), "QGemm": (3, 6),
    "MatMulNBits": (1, 5), "GatherBlockQuantized": (0,), "DynamicQuantizeLSTM": (1, 2, 3), "QAttention": (1, 2),
}  # fmt: skip
_QUANTISED_AT = frozenset({"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul",
                           "MatMulIntegerToFloat", "QGemm", "GatherBlockQuantized", "DynamicQuantizeLSTM",
                           "QAttention", "DequantizeLinear", "MatMulNBits"})  # fmt: skip
_SETTINGS = frozenset({"Clip", "Pad", "Resize", "Upsample", "Range", "Pow", "Where", "Equal", "Less", "Greater",
                       "LessOrEqual", "GreaterOrEqual", "Mod", "OneHot", "STFT", "Max", "Min", "Div", "QuantizeLinear",
                       "ConstantOfShape", "Tile", "RandomNormal", "NonMaxSuppression", "RotaryEmbedding",
                       "TopK", "Trilu", "CumSum", "IsInf", "Dropout"})  # fmt: skip
_CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "QLinearConv", "ConvTranspose"})
_PRODUCTS = frozenset({"Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "QGemm",
                       "MatMulIntegerToFloat", "MatMulNBits", "FusedMatMul"})  # fmt: skip
_RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1}
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "PackedAttention",
                        "DecoderMaskedMultiHeadAttention"})  # fmt: skip
_KINDS = {
    "BatchNormalization": "BatchNorm", "LayerNormalization": "LayerNorm", "SimplifiedLayerNormalization": "RMSNorm",
    "SkipLayerNormalization": "LayerNorm", "SkipSimplifiedLayerNormalization": "RMSNorm",
    "RMSNormalization": "RMSNorm", "InstanceNormalization": "InstanceNorm", "GroupNormalization": "GroupNorm",
    "PRelu": "PReLU", "Gather": "Embedding", "GatherBlockQuantized": "Embedding", "DynamicQuantizeLSTM": "LSTM",
    "Attention": "MultiheadAttention", "QAttention": "MultiheadAttention", "TreeEnsembleClassifier": "TreeEnsemble",
    "TreeEnsembleRegressor": "TreeEnsemble", "TreeEnsemble": "TreeEnsemble", "SVMClassifier": "SVM",
    "SVMRegressor": "SVM",
}  # fmt: skip
_COEFFICIENTS = ("coefficients", "intercepts", "support_vectors", "rho")  # attributes that are weights: scikit-learn's
_VIEWS = frozenset({"Constant", "Identity", "Shape", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast", "Dropout"})
_BRANCHES = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_NO_FLOPS_RULE = _ATTENTION | {"Einsum", "DynamicQuantizeLSTM", "DeformConv"}
_VALUE_BYTES = 4
_MAX_JOINED = 32
_MAX_TRACED = 24


@dataclass(frozen=True, slots=True)
class _Source:
    """A value that is made of tensors of the file only."""

    tensors: tuple[OnnxTensor, ...]
    quantised: bool = False


@dataclass(slots=True)
class LayerFinder:
    """Walks all graphs of a model once and collects its layers."""

    model: OnnxModel
    layers: list[Layer] = field(default_factory=list)
    of_node: dict[int, Layer] = field(default_factory=dict)  # by the place of a node in the main graph
    parameters: int = 0
    dtypes: set[str] = field(default_factory=set)
    nested: bool = False  # layers lie in branches or loops: how often they run is not known
    without_count: bool = False  # trees: what their parameters are is not agreed
    nodes: int = 0
    constant: set[str] = field(default_factory=set)  # values of the main graph that no input changes
    counted: dict[int, OnnxTensor] = field(default_factory=dict)
    _sources: dict[str, _Source] = field(default_factory=dict)  # by the name of a value
    _log: list[tuple[str, _Source | None]] = field(default_factory=list)
    _product_of: dict[str, Layer] = field(default_factory=dict)  # output of a product -> its layer, for the bias
    _by_prefix: dict[str, Layer] = field(default_factory=dict)
    _scores: set[str] = field(default_factory=set)  # what a softmax takes
    _reshaped: set[str] = field(default_factory=set)
    _scaled_again: set[str] = field(default_factory=set)

    def walk(self, graph: Graph, main: bool = True) -> None:
        for name, tensor in graph.tensors.items():
            self._define(name, _Source((tensor,)))
        if main:
            self.constant |= graph.tensors.keys()
        self._reshaped |= {name for node in graph.nodes if node.kind == "Reshape" for name in node.outputs}
        self._scaled_again |= _scaled_again(graph)
        self._scores |= {node.inputs[0] for node in graph.nodes if node.kind == "Softmax" and node.inputs}
        for place, node in enumerate(graph.nodes):
            self.nodes += 1
            self._note_constants(node)
            layer = self._layer(node)
            if layer is not None:
                self.nested = self.nested or not main
                if main:
                    self.of_node[place] = layer
            for inner in node.graphs:  # its names end with it
                mark = len(self._log)
                self.walk(inner, main=False)
                while len(self._log) > mark:
                    name, before = self._log.pop()
                    if before is None:
                        self._sources.pop(name, None)
                    else:
                        self._sources[name] = before
            if main and not node.graphs and all(name in self.constant for name in node.inputs if name):
                self.constant.update(node.outputs)

    def _define(self, name: str, source: _Source) -> None:
        self._log.append((name, self._sources.get(name)))
        self._sources[name] = source

    def _note_constants(self, node: Node) -> None:
        """A value that is a tensor of the file, under another name, cut or put together again."""
        if not node.outputs:
            return
        first = self._sources.get(node.inputs[0]) if node.inputs else None
        if node.kind == "Constant":
            value = node.attributes.get("value")
            if isinstance(value, OnnxTensor):
                self._define(node.outputs[0], _Source((value,)))
        elif first is None:
            return
        elif node.kind == "ConstantOfShape":
            sizes = first.tensors[0].values
            if sizes is not None and all(0 <= size < 1 << 40 for size in sizes):
                filled = node.attributes.get("value")
                dtype = filled.dtype if isinstance(filled, OnnxTensor) else "F32"
                self._define(node.outputs[0], _Source((OnnxTensor(node.outputs[0], dtype, sizes, made=True),)))
        elif node.kind == "Concat" and len(node.inputs) <= _MAX_JOINED:
            parts = [self._sources.get(name) for name in node.inputs]
            joined = {id(tensor): tensor for part in parts if part for tensor in part.tensors}
            if all(parts) and len(joined) <= _MAX_JOINED:
                self._define(node.outputs[0], _Source(tuple(joined.values()), first.quantised))
        elif node.kind in _THROUGH:
            source = _Source(first.tensors, first.quantised or node.kind == "DequantizeLinear")
            for name in node.outputs:
                self._define(name, source)

    def _layer(self, node: Node) -> Layer | None:
        joins = node.kind == "Concat" and node.outputs and node.outputs[0] in self._sources
        if node.kind in _THROUGH or node.kind in _BRANCHES or joins:
            return None
        product = next((self._product_of[name] for name in node.inputs if name in self._product_of), None)
        is_bias = node.kind == "Add" and product is not None
        weights = []
        for at, name in enumerate(node.inputs):
            source = self._sources.get(name)
            for tensor in source.tensors if source else ():
                quantised = source is not None and source.quantised
                if _is_weight(node, at, tensor, quantised, is_bias) and not self._is_mask(node, tensor):
                    weights.append(tensor)
        if node.outputs and node.outputs[0] in self._scaled_again:
            weights = [tensor for tensor in weights if not _is_vector(tensor)]
        if node.kind == "InstanceNormalization" and node.inputs and node.inputs[0] in self._reshaped:
            weights = []  # a group normalisation, written with neutral ones
        known = all(id(tensor) in self.counted for tensor in weights)
        count = sum(self._count(node, tensor) for tensor in weights)
        if node.domain == "ai.onnx.ml":
            count += sum(node.lengths.get(name, 0) for name in _COEFFICIENTS)
            self.without_count = self.without_count or node.kind.startswith("TreeEnsemble")
        self.parameters += count
        computes = node.kind in _CONVOLUTIONS | _PRODUCTS | _ATTENTION or node.kind in _RECURRENT
        if not weights and not count and not computes and not node.kind.startswith("TreeEnsemble"):
            return None
        if is_bias and product is not None:
            product.parameters += count
            return None
        prefix = _prefix(node, weights, len(self.layers))
        layer = self._by_prefix.get(prefix)
        if layer is not None and computes and known and weights:
            return layer  # used once more
        if layer is not None and not computes:
            layer.parameters += count  # the shift beside a scale
            return None
        layer = Layer(prefix, _kind(node, weights, self._shape_of(node), prefix), count)
        self.layers.append(layer)
        self._by_prefix.setdefault(prefix, layer)
        if node.kind in _PRODUCTS and weights and node.outputs:
            self._product_of[node.outputs[0]] = layer
        return layer

    def _count(self, node: Node, tensor: OnnxTensor) -> int:
        """The parameters that a tensor adds: none when another node has it already."""
        if id(tensor) in self.counted:
            return 0
        self.counted[id(tensor)] = tensor
        self.dtypes.add(tensor.dtype)
        if node.kind == "MatMulNBits" and tensor.dtype in ("U8", "I8") and len(tensor.shape) > 1:  # several in a byte
            self.dtypes.add(f"U{node.integer('bits', 4)}")
            self.dtypes.discard(tensor.dtype)
            return max(0, node.integer("K", 0)) * max(0, node.integer("N", 0))
        if node.kind == "Concat":  # a token put before the others, which may have been repeated for each sample
            return tensor.elements // max(tensor.shape[0], 1)
        return tensor.elements

    def _is_mask(self, node: Node, tensor: OnnxTensor) -> bool:
        """It is added to the scores of attention."""
        return node.kind == "Add" and len(tensor.shape) > 1 and bool(node.outputs) and node.outputs[0] in self._scores

    def _shape_of(self, node: Node) -> Shape:
        """Of the weights of a convolution."""
        at = WEIGHTS_AT.get(node.kind, 1)
        found = self._sources.get(node.inputs[at]) if at < len(node.inputs) else None
        return found.tensors[0].shape if found else ()

    def attends(self) -> bool:
        """A softmax of one product goes into another, or an operator says so by its name."""
        main = self.model.graph
        graphs = [*(main.everywhere() if main else ()), *self.model.functions]
        return any(_attends(graph) for graph in graphs)

    def measure(self, graph: Graph, known: Shapes, batch: int) -> tuple[bool, bool]:
        """Writes FLOPs, outputs and activations into the layers; whether all FLOPs, and all activations, are known."""
        flops_known = activations_known = True
        current = self.layers[0] if self.layers else None
        for place, node in enumerate(graph.nodes):
            layer = self.of_node.get(place)
            current = layer or current
            try:
                flops = _flops(node, known)
            except (KeyError, IndexError, ValueError):
                flops, flops_known = 0.0, False
            if layer is not None:
                layer.flops += flops / batch
                shape = known.shapes.get(node.outputs[0]) if node.outputs else None
                if shape:
                    layer.output_shape = shape[1:]
                    layer.output_bytes = math.prod(shape) * _VALUE_BYTES / batch
            if node.kind in _VIEWS or current is None:
                continue
            for name in node.outputs:
                if not name or name in self.constant or name in known.numbers:
                    continue
                if name not in known.shapes:
                    activations_known = False
                    continue
                current.activation_bytes += math.prod(known.shapes[name]) * _VALUE_BYTES / batch
        return flops_known and not self.nested, activations_known and not self.nested


def _is_weight(node: Node, at: int, tensor: OnnxTensor, quantised: bool, is_bias: bool) -> bool:
    places = _WEIGHTS.get(node.kind)
    if places is not None and at not in places:
        return False
    if node.kind == "Gemm" and at == 2 and node.attributes.get("beta") == 0:
        return False  # it is multiplied with nothing: a product that an exporter had no other operator for
    if tensor.dtype not in _FLOATS:
        integers = tensor.dtype in ("I8", "U8", "I4", "U4", "I2", "U2", "I32", "I16", "U16")
        return integers and (quantised or (node.kind in _QUANTISED_AT and places is not None))
    if places is not None:
        return True
    if tensor.made or node.kind in _SETTINGS or not tensor.shape:
        return False
    if node.kind == "Concat":
        return len(tensor.shape) == 3 and tensor.elements > tensor.shape[0]
    if node.kind == "Mul" and not _is_vector(tensor):
        return False  # a table, of rotations for instance: scales are vectors
    return tensor.elements > 1 or is_bias or node.kind in _PRODUCTS


def _is_vector(tensor: OnnxTensor) -> bool:
    return sum(size > 1 for size in tensor.shape) <= 1


def _scaled_again(graph: Graph) -> set[str]:
    """What a scale and a shift right behind a batch norm make, which has both itself: in models that come from Caffe
    one of the two pairs is neutral."""
    constant = set(graph.tensors)
    for node in graph.nodes:
        if node.kind in _THROUGH | {"ConstantOfShape", "Constant"} and all(name in constant for name in node.inputs):
            constant.update(node.outputs)
    normed = {name for node in graph.nodes if node.kind == "BatchNormalization" for name in node.outputs[:1]}
    scaled = _made_with(graph, "Mul", normed, constant)
    return {name for pair in _made_with(graph, "Add", set(scaled), constant).items() for name in pair}


def _made_with(graph: Graph, kind: str, values: set[str], constant: set[str]) -> dict[str, str]:
    """What operators of a kind make of one of `values` and something constant, and of which."""
    found = {}
    for node in graph.nodes:
        of = [name for name in node.inputs if name in values]
        if node.kind == kind and node.outputs and of and len(node.inputs) == 2 and constant & set(node.inputs):
            found[node.outputs[0]] = of[0]
    return found


def _kind(node: Node, weights: list[OnnxTensor], shape: Shape, prefix: str) -> str:
    if node.kind in _CONVOLUTIONS:
        transposed = "Transpose" if node.kind == "ConvTranspose" else ""
        return f"Conv{transposed}{max(len(shape) - 2, 1)}d"
    if node.kind in _PRODUCTS:
        return "Linear" if weights else "MatMul"
    if node.kind == "Mul" and weights and len(weights[0].shape) == 1 and "norm" in prefix.lower():
        return "LayerNorm"
    return _KINDS.get(node.kind, node.kind)


def _prefix(node: Node, weights: list[OnnxTensor], number: int) -> str:
    """The module that a weight belongs to, as exporters name it; else the node's own name."""
    for tensor in weights:
        module, dot, _ = tensor.name.rpartition(".")
        if dot and "::" not in tensor.name and "/" not in tensor.name:
            return module
    scope = node.name.strip("/")
    if "/" in scope:
        return scope.rpartition("/")[0].replace("/", ".")
    return scope or f"{node.kind}_{number}"


def _attends(graph: Graph) -> bool:
    """Two products of computed values with a softmax on the way from the one to the other."""
    made_by = {name: node for node in graph.nodes for name in node.outputs}
    products = [
        node
        for node in graph.nodes
        if node.kind in _PRODUCTS and not any(name in graph.tensors for name in node.inputs)
    ]
    found = {id(node) for node in products}
    for node in products:
        softmax = _before(node, made_by, lambda each: each.kind == "Softmax")
        if softmax is not None and _before(softmax, made_by, lambda each: id(each) in found) is not None:
            return True
    return any(node.kind in _ATTENTION for node in graph.nodes)


def _before(node: Node, made_by: Mapping[str, Node], wanted: Callable[[Node], bool]) -> Node | None:
    """The nearest node of that kind that leads here, without another product between."""
    todo, seen = [made_by[name] for name in node.inputs if name in made_by], {id(node)}
    for _ in range(_MAX_TRACED):
        if not todo:
            break
        here = todo.pop(0)
        if wanted(here):
            return here
        if id(here) not in seen and here.kind not in _PRODUCTS | _CONVOLUTIONS:
            seen.add(id(here))
            todo += [made_by[name] for name in here.inputs[:4] if name in made_by]
    return None


def _flops(node: Node, known: Shapes) -> float:
    """Of one run of the node with the whole batch. Raises KeyError when a shape is not known."""
    kind = node.kind
    if kind in _NO_FLOPS_RULE:
        raise KeyError(kind)
    if kind in _CONVOLUTIONS:
        data, weights = known.of(node, 0), known.of(node, WEIGHTS_AT[kind])
        moved = data if kind == "ConvTranspose" else known.shapes[node.outputs[0]]
        return 2.0 * math.prod(moved) * math.prod(weights[1:])
    if kind == "Gemm":
        left = known.of(node, 0)
        return 2.0 * math.prod(left) * known.shapes[node.outputs[0]][-1]
    if kind == "MatMulNBits":
        return 2.0 * math.prod(known.of(node, 0)) * node.integer("N", 0)
    if kind in _PRODUCTS:
        return 2.0 * math.prod(known.shapes[node.outputs[0]]) * known.of(node, 0)[-1]
    if kind in _RECURRENT:
        data, weights, again = known.of(node, 0), known.of(node, 1), known.of(node, 2)
        return 2.0 * data[0] * data[1] * (math.prod(weights) + math.prod(again))
    return 0.0
