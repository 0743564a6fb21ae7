"""The shapes that values of an ONNX graph have, followed from the inputs through the operators that models are made of.

Owns the arithmetic of shapes and of the small integer tensors that reshape them. What an operator does that is not here
stays unknown, and so does all that follows from it, unless the file itself says its shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from coordinator.identify.onnx_graph import KEPT_INTEGERS, Graph, Node, OnnxTensor

Shape = tuple[int, ...]
Integers = tuple[int, ...]
_MAX_RANK = 64

_SAME_WORDS = """
    Relu LeakyRelu PRelu Elu Selu Celu ThresholdedRelu HardSigmoid HardSwish Sigmoid Tanh Softplus Softsign Mish Gelu
    FastGelu BiasGelu Softmax LogSoftmax Hardmax Erf Exp Log Sqrt Reciprocal Neg Abs Sign Floor Ceil Round Sin Cos Clip
    Identity Cast CastLike Dropout BatchNormalization InstanceNormalization LayerNormalization GroupNormalization
    SimplifiedLayerNormalization RMSNormalization LRN LpNormalization MeanVarianceNormalization Not IsNaN Swish
    QuantizeLinear DequantizeLinear DynamicQuantizeLinear CumSum Trilu
"""
_BROADCAST_WORDS = """
    Add Sub Mul Div Pow Mod Min Max Sum Mean Where And Or Xor Equal Less Greater LessOrEqual GreaterOrEqual
    BitwiseAnd BitwiseOr
"""
_SAME = frozenset(_SAME_WORDS.split())
_BROADCAST = frozenset(_BROADCAST_WORDS.split())
_REDUCE = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceLogSumExp",
           "ReduceSumSquare")  # fmt: skip
WEIGHTS_AT = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "ConvTranspose": 1}


class Shapes:
    """Known shapes and small integers by name; `follow` adds those of the nodes, in their order."""

    def __init__(self, known: Mapping[str, Shape], tensors: Mapping[str, OnnxTensor]) -> None:
        self.shapes: dict[str, Shape] = dict(known)
        self.numbers: dict[str, Integers] = {}
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def put(self, name: str, tensor: OnnxTensor) -> None:
        self.shapes[name] = tensor.shape
        if tensor.values is not None:
            self.numbers[name] = tensor.values

    def follow(self, graph: Graph) -> None:
        for node in graph.nodes:
            try:
                found = self._infer(node)
                numbers = self._numbers(node)
            except (IndexError, ValueError, ZeroDivisionError, KeyError, OverflowError):
                continue  # the operator is not given what it needs: its results stay unknown
            for name, shape in zip(node.outputs, found, strict=False):
                fits = len(shape) <= _MAX_RANK and all(0 <= size < 1 << 40 for size in shape)
                if name and name not in self.shapes and fits:
                    self.shapes[name] = shape
            if numbers is None or len(numbers) > KEPT_INTEGERS or not node.outputs:
                continue
            if all(abs(number) <= 1 << 63 for number in numbers):
                self.numbers[node.outputs[0]] = numbers

    def of(self, node: Node, index: int) -> Shape:
        return self.shapes[node.inputs[index]]

    def _given(self, node: Node, index: int, attribute: str = "") -> Integers | None:
        """Integers that are an input in newer operator sets and an attribute in older ones."""
        if attribute and (found := node.integers(attribute)) is not None:
            return found
        name = node.inputs[index] if index < len(node.inputs) else ""
        if not name:
            return None
        return self.numbers[name]

    def _infer(self, node: Node) -> list[Shape]:
        kind = node.kind
        if kind in _SAME:
            return [self.of(node, 0)] * len(node.outputs[:1])
        if kind in _BROADCAST:
            return [broadcast(*(self.shapes[name] for name in node.inputs if name))]
        if kind in _REDUCE:
            return [self._reduce(node)]
        rule = _RULES.get(kind)
        return rule(self, node) if rule else []

    def _reduce(self, node: Node) -> Shape:
        shape = self.of(node, 0)
        axes = self._given(node, 1, "axes")
        if axes is None:
            axes = () if node.integer("noop_with_empty_axes", 0) else tuple(range(len(shape)))
        gone = {axis % len(shape) for axis in axes}
        if node.integer("keepdims", 1):
            return tuple(1 if at in gone else size for at, size in enumerate(shape))
        return tuple(size for at, size in enumerate(shape) if at not in gone)

    def _convolution(self, node: Node) -> list[Shape]:
        data, weights = self.of(node, 0), self.of(node, WEIGHTS_AT[node.kind])
        return [(data[0], weights[0], *_windows(node, data[2:], weights[2:]))]

    def _transposed(self, node: Node) -> list[Shape]:
        data, weights = self.of(node, 0), self.of(node, 1)
        count = len(data) - 2
        strides, dilations, pads = _settings(node, count)
        extra = node.integers("output_padding") or (0,) * count
        sizes = node.integers("output_shape") or tuple(
            strides[at] * (data[at + 2] - 1) + extra[at] + (weights[at + 2] - 1) * dilations[at] + 1
            - pads[at] - pads[at + count]
            for at in range(count)
        )  # fmt: skip
        return [(data[0], weights[1] * node.integer("group", 1), *sizes)]

    def _pool(self, node: Node) -> list[Shape]:
        data = self.of(node, 0)
        found = (*data[:2], *_windows(node, data[2:], node.integers("kernel_shape") or ()))
        return [found] * len(node.outputs)

    def _global_pool(self, node: Node) -> list[Shape]:
        data = self.of(node, 0)
        return [(*data[:2], *(1 for _ in data[2:]))]

    def _gemm(self, node: Node) -> list[Shape]:
        left, right = self.of(node, 0), self.of(node, 1)
        return [(left[1 if node.integer("transA", 0) else 0], right[0 if node.integer("transB", 0) else 1])]

    def _matrix_product(self, node: Node) -> list[Shape]:
        left, right = self.of(node, 0), self.of(node, 3 if node.kind == "QLinearMatMul" else 1)
        if len(left) == 1 or len(right) == 1:
            return [(*left[:-1], *right[-1:])] if len(right) > 1 else [left[:-1]]
        return [(*broadcast(left[:-2], right[:-2]), left[-2], right[-1])]

    def _flatten(self, node: Node) -> list[Shape]:
        shape = self.of(node, 0)
        axis = node.integer("axis", 1)
        axis += len(shape) if axis < 0 else 0
        return [(math.prod(shape[:axis]), math.prod(shape[axis:]))]

    def _reshape(self, node: Node) -> list[Shape]:
        shape, wanted = self.of(node, 0), self._given(node, 1, "shape")
        if wanted is None:
            raise ValueError
        keep = not node.integer("allowzero", 0)
        sizes = [shape[at] if size == 0 and keep else size for at, size in enumerate(wanted)]
        if -1 in sizes:
            rest = math.prod(size for size in sizes if size != -1)
            sizes[sizes.index(-1)] = math.prod(shape) // rest
        return [tuple(sizes)]

    def _transpose(self, node: Node) -> list[Shape]:
        shape = self.of(node, 0)
        order = node.integers("perm") or tuple(reversed(range(len(shape))))
        return [tuple(shape[at] for at in order)]

    def _concatenate(self, node: Node) -> list[Shape]:
        shapes = [self.shapes[name] for name in node.inputs]
        axis = node.integer("axis", 1) % len(shapes[0])
        return [(*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])]

    def _squeeze(self, node: Node) -> list[Shape]:
        shape, axes = self.of(node, 0), self._given(node, 1, "axes")
        if axes is None:
            axes = tuple(at for at, size in enumerate(shape) if size == 1)
        gone = {axis % len(shape) for axis in axes}
        return [tuple(size for at, size in enumerate(shape) if at not in gone)]

    def _unsqueeze(self, node: Node) -> list[Shape]:
        shape, axes = list(self.of(node, 0)), self._given(node, 1, "axes")
        rank = len(shape) + len(axes or ())
        for axis in sorted(axis % rank for axis in axes or ()):
            shape.insert(axis, 1)
        return [tuple(shape)]

    def _gather(self, node: Node) -> list[Shape]:
        shape, indices = self.of(node, 0), self.of(node, 1)
        axis = node.integer("axis", 0) % len(shape)
        return [(*shape[:axis], *indices, *shape[axis + 1 :])]

    def _gather_each(self, node: Node) -> list[Shape]:
        return [self.of(node, 1)]

    def _slice(self, node: Node) -> list[Shape]:
        shape = list(self.of(node, 0))
        starts, ends = self._given(node, 1, "starts"), self._given(node, 2, "ends")
        axes, steps = self._given(node, 3, "axes"), self._given(node, 4)
        for place, (start, end) in enumerate(zip(starts or (), ends or (), strict=True)):
            axis = (axes[place] if axes else place) % len(shape)
            shape[axis] = len(range(shape[axis])[slice(start, end, steps[place] if steps else 1)])
        return [tuple(shape)]

    def _split(self, node: Node) -> list[Shape]:
        shape = self.of(node, 0)
        axis = node.integer("axis", 0) % len(shape)
        sizes = self._given(node, 1, "split")
        if sizes is None:
            part = -(-shape[axis] // len(node.outputs))
            sizes = tuple(min(part, shape[axis] - at * part) for at in range(len(node.outputs)))
        return [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]

    def _pad(self, node: Node) -> list[Shape]:
        shape, pads = self.of(node, 0), self._given(node, 1, "pads") or node.integers("paddings")
        if pads is None or len(pads) != 2 * len(shape):
            raise ValueError
        return [tuple(size + pads[at] + pads[at + len(shape)] for at, size in enumerate(shape))]

    def _expand(self, node: Node) -> list[Shape]:
        return [broadcast(self.of(node, 0), self.numbers[node.inputs[1]])]

    def _tile(self, node: Node) -> list[Shape]:
        return [tuple(a * b for a, b in zip(self.of(node, 0), self.numbers[node.inputs[1]], strict=True))]

    def _filled(self, node: Node) -> list[Shape]:
        return [self.numbers[node.inputs[0]]]

    def _constant(self, node: Node) -> list[Shape]:
        value = node.attributes.get("value")
        return [value.shape] if isinstance(value, OnnxTensor) else [()]

    def _recurrent(self, node: Node) -> list[Shape]:
        data, weights = self.of(node, 0), self.of(node, 2)  # weights: directions, gates * hidden, hidden
        if node.integer("layout", 0):
            raise ValueError
        directions, hidden = weights[0], weights[2]
        last = (directions, data[1], hidden)
        return [(data[0], directions, data[1], hidden), last, last]

    def _shape_of(self, node: Node) -> list[Shape]:
        return [(len(range(len(self.of(node, 0)))[slice(*_bounds(node))]),)]

    def _space(self, node: Node) -> list[Shape]:
        batch, channels, height, width = self.of(node, 0)
        block = node.integer("blocksize", 1)
        if node.kind == "DepthToSpace":
            return [(batch, channels // block**2, height * block, width * block)]
        return [(batch, channels * block**2, height // block, width // block)]

    def _resize(self, node: Node) -> list[Shape]:
        sizes = self._given(node, 3)
        return [sizes] if sizes and len(sizes) == len(self.of(node, 0)) else []

    def _numbers(self, node: Node) -> Integers | None:
        """What the operator makes of small integer tensors, where it is one of those that compute shapes."""
        match node.kind:
            case "Constant":
                value = node.attributes.get("value")
                if isinstance(value, OnnxTensor):
                    return value.values
                number = node.attributes.get("value_int")
                return (number,) if isinstance(number, int) else node.integers("value_ints")
            case "Shape" if node.inputs[0] in self.shapes:
                return self.of(node, 0)[slice(*_bounds(node))]
            case "Concat" if len(node.inputs) <= _MAX_RANK and all(name in self.numbers for name in node.inputs):
                return tuple(number for name in node.inputs for number in self.numbers[name])
        if not node.inputs or node.inputs[0] not in self.numbers:
            return None
        first = self.numbers[node.inputs[0]]
        match node.kind:
            case "Cast" | "Identity" | "Unsqueeze" | "Squeeze" | "Reshape":
                return first
            case "Gather":
                return tuple(first[at] for at in self.numbers[node.inputs[1]])
            case "Slice":
                starts, ends = self._given(node, 1, "starts"), self._given(node, 2, "ends")
                steps = self._given(node, 4)
                return first[slice((starts or (0,))[0], (ends or (0,))[0], steps[0] if steps else 1)]
            case "ConstantOfShape" if math.prod(first) <= KEPT_INTEGERS:
                value = node.attributes.get("value")
                fill = value.values if isinstance(value, OnnxTensor) else None
                return fill * math.prod(first) if fill is not None and len(fill) == 1 else None
            case "Where":
                chosen = _together(first, self.numbers[node.inputs[1]], self.numbers[node.inputs[2]])
                return tuple(a if condition else b for condition, a, b in zip(*chosen, strict=True))
            case kind if kind in _ARITHMETIC:
                return tuple(map(_ARITHMETIC[kind], *_together(first, self.numbers[node.inputs[1]])))
        return None


def _together(*numbers: Integers) -> list[Integers]:
    """As many of each: a single one is repeated. Raises ValueError for others."""
    count = max(map(len, numbers))
    if not all(len(each) in (1, count) for each in numbers):
        raise ValueError("numbers do not go together")
    return [each * count if len(each) == 1 else each for each in numbers]


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: int(a / b) if abs(a) < 1 << 50 else a // b,
    "Mod": lambda a, b: a % b,
    "Min": min,
    "Max": max,
    "Equal": lambda a, b: int(a == b),
}
_RULES: dict[str, Callable[[Shapes, Node], list[Shape]]] = {
    "Conv": Shapes._convolution, "ConvInteger": Shapes._convolution, "QLinearConv": Shapes._convolution,
    "ConvTranspose": Shapes._transposed, "MaxPool": Shapes._pool, "AveragePool": Shapes._pool, "LpPool": Shapes._pool,
    "GlobalAveragePool": Shapes._global_pool, "GlobalMaxPool": Shapes._global_pool, "Gemm": Shapes._gemm,
    "MatMul": Shapes._matrix_product, "MatMulInteger": Shapes._matrix_product,
    "QLinearMatMul": Shapes._matrix_product, "Flatten": Shapes._flatten, "Reshape": Shapes._reshape,
    "Transpose": Shapes._transpose, "Concat": Shapes._concatenate, "Squeeze": Shapes._squeeze,
    "Unsqueeze": Shapes._unsqueeze, "GatherElements": Shapes._gather_each, "Gather": Shapes._gather,
    "Slice": Shapes._slice, "Split": Shapes._split, "Pad": Shapes._pad, "Expand": Shapes._expand,
    "Tile": Shapes._tile, "ConstantOfShape": Shapes._filled, "Constant": Shapes._constant, "LSTM": Shapes._recurrent,
    "GRU": Shapes._recurrent, "RNN": Shapes._recurrent, "Shape": Shapes._shape_of, "DepthToSpace": Shapes._space,
    "SpaceToDepth": Shapes._space, "Resize": Shapes._resize,
}  # fmt: skip


def broadcast(*shapes: Shape) -> Shape:
    """numpy's rule; raises ValueError for shapes that do not go together."""
    rank = max(map(len, shapes), default=0)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    found = []
    for sizes in zip(*padded, strict=True):
        wanted = {size for size in sizes if size != 1}
        if len(wanted) > 1:
            raise ValueError("shapes do not go together")
        found.append(wanted.pop() if wanted else 1)
    return tuple(found)


def _bounds(node: Node) -> tuple[int, int | None]:
    end = node.attributes.get("end")
    return node.integer("start", 0), end if isinstance(end, int) else None


def _settings(node: Node, count: int) -> tuple[Integers, Integers, Integers]:
    strides = node.integers("strides") or (1,) * count
    dilations = node.integers("dilations") or (1,) * count
    return strides, dilations, node.integers("pads") or (0,) * (2 * count)


def _windows(node: Node, sizes: Shape, kernel: Shape) -> Shape:
    """How often a window fits, per dimension."""
    count = len(sizes)
    strides, dilations, pads = _settings(node, count)
    automatic = node.attributes.get("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        return tuple(-(-size // stride) for size, stride in zip(sizes, strides, strict=True))
    if automatic == "VALID":
        pads = (0,) * (2 * count)
    up = node.integer("ceil_mode", 0)
    found = []
    for at in range(count):
        room = sizes[at] + pads[at] + pads[at + count] - dilations[at] * (kernel[at] - 1) - 1
        found.append((-(-room // strides[at]) if up else room // strides[at]) + 1)
    return tuple(found)
