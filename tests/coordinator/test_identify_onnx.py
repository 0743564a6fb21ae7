"""ONNX files, written here byte by byte: what is a parameter and a layer, what it computes, and what is refused."""

from __future__ import annotations

import asyncio
import io
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_models import public_file
from wire import Content, cut_everywhere, field, message, outcome, packed, varint

from coordinator.identify import onnx_file
from coordinator.identify.confine import identify_file, identify_folder
from protos.errors import SpecError
from protos.model import Family, ModelProfile

F32, U8, I8, I32, I64, BOOL = 1, 2, 3, 6, 7, 9
ITEM_BYTES = {F32: 4, U8: 1, I8: 1, I32: 4, I64: 8, BOOL: 1}


def tensor(name: str, dims: tuple[int, ...], dtype: int = F32, data: bytes | None = None) -> bytes:
    content = bytes(math.prod(dims) * ITEM_BYTES[dtype]) if data is None else data
    return message((1, packed(dims)), (2, dtype), (8, name), (9, content))


def integers(name: str, *values: int) -> bytes:
    return tensor(name, (len(values),), I64, b"".join(value.to_bytes(8, "little", signed=True) for value in values))


def elsewhere(name: str, dims: tuple[int, ...], location: str) -> bytes:
    return message((1, packed(dims)), (2, F32), (8, name), (13, message((1, "location"), (2, location))), (14, 1))


def node(kind: str, inputs: str, outputs: str, name: str = "", domain: str = "", **attributes: object) -> bytes:
    parts = [field(1, each if each != "_" else "") for each in inputs.split()]
    parts += [field(2, each) for each in outputs.split()]
    parts += [field(3, name), field(4, kind), field(7, domain)]
    for key, value in attributes.items():
        fields: list[tuple[int, Content]] = [(1, key)]
        if isinstance(value, tuple) and value and isinstance(value[0], float):
            fields += [(7, each) for each in value]
        elif isinstance(value, tuple):
            fields.append((8, packed(value)))
        elif isinstance(value, bytes):  # a graph, or a tensor
            fields.append((6 if key.endswith("branch") else 5, value))
        elif isinstance(value, (int, float)):
            fields.append((3 if isinstance(value, int) else 2, value))
        parts.append(field(5, message(*fields)))
    return b"".join(parts)


def value(name: str, *dims: int | str, dtype: int = F32) -> bytes:
    shape = message(*((1, message((1, each) if isinstance(each, int) else (2, each))) for each in dims))
    return message((1, name), (2, message((1, message((1, dtype), (2, shape))))))


def graph(nodes: list[bytes], tensors: list[bytes], inputs: list[bytes], outputs: list[bytes]) -> bytes:
    parts: list[tuple[int, Content]] = [(1, each) for each in nodes]
    parts += [(5, each) for each in tensors] + [(11, each) for each in inputs] + [(12, each) for each in outputs]
    return message(*parts)


def model(content: bytes) -> bytes:
    return message((1, 8), (2, "tests"), (7, content), (8, message((1, ""), (2, 18))))


def read(content: bytes, **more: dict[str, int]) -> ModelProfile:
    return onnx_file.read(io.BytesIO(content), len(content), **more)


def convolutional(*dimensions: int | str) -> bytes:
    return graph(
        [
            node("Conv", "x conv.weight conv.bias", "a", "conv", pads=(1, 1, 1, 1), strides=(2, 2)),
            node("BatchNormalization", "a bn.weight bn.bias bn.mean bn.var", "b"),
            node("Relu", "b", "c"),
            node("GlobalAveragePool", "c", "d"),
            node("Shape", "d", "s"),
            node("Gather", "s zero", "batch"),
            node("Unsqueeze", "batch axes", "rows"),
            node("Concat", "rows minus", "sizes", axis=0),
            node("Reshape", "d sizes", "e"),
            node("Gemm", "e fc.weight fc.bias", "f", "fc", transB=1),
            node("Softmax", "f", "y"),
        ],
        [
            tensor("conv.weight", (8, 3, 3, 3)), tensor("conv.bias", (8,)), tensor("bn.weight", (8,)),
            tensor("bn.bias", (8,)), tensor("bn.mean", (8,)), tensor("bn.var", (8,)), tensor("fc.weight", (10, 8)),
            tensor("fc.bias", (10,)), integers("minus", -1), integers("axes", 0),
            tensor("zero", (), I64, bytes(8)),
        ],
        [value("x", *dimensions)],
        [value("y", "n", 10)],
    )  # fmt: skip


CONVOLUTIONAL = convolutional("n", 3, 32, 32)
PARAMETERS = 8 * 27 + 8 + 16 + 90


def test_a_classifier_with_an_open_batch_is_described_exactly() -> None:
    profile = read(model(CONVOLUTIONAL))
    assert (profile.framework, profile.format, profile.trainable) == ("onnx", "onnx", False)
    assert (profile.parameters, profile.family, profile.task) == (PARAMETERS, Family.CNN, "classification")
    assert (profile.input_shape, profile.dtypes, profile.unknown) == ((3, 32, 32), ("F32",), ())
    layers = {layer.name: (layer.kind, layer.parameters, layer.flops_per_sample) for layer in profile.layers}
    assert layers == {
        "conv": ("Conv2d", 224, 2.0 * 8 * 16 * 16 * 27),
        "bn": ("BatchNorm", 16, 0.0),
        "fc": ("Linear", 90, 160.0),
    }
    assert profile.requirements.source == "layers"
    map_bytes = 4.0 * 8 * 16 * 16
    assert profile.activation_bytes_per_sample == 3 * map_bytes + 8 * 4 + 2 * 10 * 4
    needed = 16 * PARAMETERS + 32 * (1.25 * profile.activation_bytes_per_sample + 2 * map_bytes)
    assert profile.requirements.gpu_memory_bytes == int(needed) < profile.requirements.memory_bytes
    assert "PyTorch source" in profile.why_not


def test_a_batch_that_the_file_fixes_is_divided_out() -> None:
    fixed = read(model(convolutional(4, 3, 32, 32)))
    assert fixed.flops_per_sample == read(model(CONVOLUTIONAL)).flops_per_sample
    assert fixed.input_shape == (3, 32, 32)


def test_another_open_dimension_leaves_flops_unknown_and_is_said() -> None:
    open_size = read(model(convolutional("n", 3, "h", "w")))
    assert open_size.parameters == PARAMETERS
    assert {"input_shape", "flops_per_sample"} <= set(open_size.unknown)
    assert open_size.flops_per_sample == 0 and open_size.requirements.source == "table"
    assert "input x: F32[n, 3, h, w]" in open_size.notes


def attention() -> bytes:
    weights = [tensor(f"blk.{name}.weight", (16, 16)) for name in "qkvo"]
    nodes = [node("MatMul", f"h blk.{name}.weight", name) for name in "qkv"]
    nodes += [
        node("Transpose", "k", "kt", perm=(0, 2, 1)),
        node("MatMul", "q kt", "scores"),
        node("Div", "scores scale", "scaled"),
        node("Softmax", "scaled", "p"),
        node("MatMul", "p v", "mixed"),
        node("MatMul", "mixed blk.o.weight", "o"),
        node("Add", "o blk.o.bias", "logits"),
    ]
    tensors = [*weights, tensor("blk.o.bias", (16,)), tensor("scale", (), F32), tensor("wte.weight", (50, 16))]
    nodes.insert(0, node("Gather", "wte.weight ids", "h"))
    return graph(nodes, tensors, [value("ids", "n", 7, dtype=I64)], [value("logits", "n", 7, 16)])


def test_attention_makes_a_transformer_and_a_bias_belongs_to_its_product() -> None:
    profile = read(model(attention()))
    assert (profile.family, profile.task) == (Family.TRANSFORMER, "language_model")
    assert profile.parameters == 50 * 16 + 4 * 256 + 16
    kinds = {layer.name: (layer.kind, layer.parameters) for layer in profile.layers if layer.parameters}
    assert kinds["wte"] == ("Embedding", 800) and kinds["blk.o"] == ("Linear", 272)
    assert profile.flops_per_sample == 4 * 2 * 7 * 16 * 16 + 2 * 2 * 7 * 7 * 16


def test_what_is_no_weight_is_not_counted() -> None:
    tensors = [
        tensor("w", (4, 4)), tensor("low", ()), tensor("high", ()), integers("shape", 2, 2),
        tensor("mask", (3, 3), BOOL), tensor("half", (1,)), tensor("fill", (3, 3)),
    ]  # fmt: skip
    nodes = [
        node("MatMul", "x w", "a"), node("MatMul", "a w", "b"), node("Clip", "b low high", "c"),
        node("Mul", "c half", "d"), node("Where", "mask d fill", "e"), node("Reshape", "e shape", "y"),
    ]  # fmt: skip
    assert read(model(graph(nodes, tensors, [value("x", 1, 4)], [value("y", 2, 2)]))).parameters == 16


def test_a_scale_and_a_shift_behind_a_batch_norm_are_its_own() -> None:
    """As models from Caffe have them. Behind anything else, or a scale alone, they are learned."""
    tensors = [tensor(name, (8,)) for name in ("scale", "shift", "mean", "var", "again", "and.again")]
    tensors.append(integers("axes", 1, 2))
    nodes = [
        node("BatchNormalization", "x scale shift mean var", "n"), node("Unsqueeze", "again axes", "a"),
        node("Mul", "n a", "s"), node("Unsqueeze", "and.again axes", "b"), node("Add", "s b", "y"),
    ]  # fmt: skip
    inputs = [value("x", "n", 8, 4, 4)]
    assert read(model(graph(nodes, tensors, inputs, [value("y")]))).parameters == 16
    assert read(model(graph([*nodes[:-1], node("Add", "s x", "y")], tensors, inputs, [value("y")]))).parameters == 24
    assert read(model(graph([node("Relu", "x", "n"), *nodes[1:]], tensors, inputs, [value("y")]))).parameters == 16


def test_what_a_product_multiplies_with_zero_is_no_bias() -> None:
    tensors = [tensor("w", (4, 4)), tensor("none", (1,))]
    for beta, parameters in ((0.0, 16), (1.0, 17)):
        nodes = [node("Gemm", "x w none", "y", beta=beta)]
        assert read(model(graph(nodes, tensors, [value("x", "n", 4)], [value("y")]))).parameters == parameters


def test_weights_are_followed_through_casts_slices_and_quantisation() -> None:
    tensors = [
        tensor("q", (6, 4), I8), tensor("scale", ()), tensor("zero", (), I8), tensor("lstm", (1, 16, 3)),
        tensor("again", (1, 16, 4)), integers("from", 0), integers("to", 8), integers("half", 8), integers("end", 16),
        integers("axis", 1),
    ]  # fmt: skip
    nodes = [
        node("DequantizeLinear", "q scale zero", "qf"),
        node("Transpose", "qf", "qt"),
        node("MatMul", "x qt", "a"),
        node("Slice", "lstm from to axis", "first"),
        node("Slice", "lstm half end axis", "second"),
        node("Concat", "second first", "turned", axis=1),
        node("LSTM", "z turned again", "y", "rnn", hidden_size=4),
    ]
    found = read(model(graph(nodes, tensors, [value("x", "n", 4), value("z", 5, "n", 3)], [value("y")])))
    assert found.parameters == 24 + 48 + 64
    assert found.family is Family.RNN and found.dtypes == ("F32", "I8")
    assert next(layer.flops_per_sample for layer in found.layers if layer.kind == "LSTM") == 2 * 5 * (48 + 64)


def test_what_exporters_write_around_a_model_is_no_parameter() -> None:
    """A mask on scores, tables of rotations and the neutral ones of a group norm; a token before the others counts."""
    weights = [tensor("q", (8, 8)), tensor("k", (8, 8)), tensor("v", (8, 8)), tensor("token", (2, 1, 8))]
    settings_ = [
        tensor("mask", (2, 1, 5, 5)), tensor("cos", (1, 5, 8)), tensor("ones", (2,)), tensor("zeros", (2,)),
        integers("groups", 0, 2, -1), integers("back", 2, 5, 8), tensor("scale", (8,)),
    ]  # fmt: skip
    nodes = [
        node("Concat", "token x", "t", axis=1), node("Reshape", "t groups", "g"),
        node("InstanceNormalization", "g ones zeros", "i"), node("Reshape", "i back", "r"), node("Mul", "r scale", "n"),
        node("MatMul", "n q", "a"), node("Mul", "a cos", "turned"), node("MatMul", "n k", "b"),
        node("Transpose", "b", "bt", perm=(0, 2, 1)), node("MatMul", "turned bt", "scores"),
        node("Add", "scores mask", "masked"), node("Softmax", "masked", "p"), node("IsNaN", "p", "broken"),
        node("Where", "broken p p", "clean"), node("MatMul", "n v", "values"), node("MatMul", "clean values", "y"),
    ]  # fmt: skip
    profile = read(model(graph(nodes, [*weights, *settings_], [value("x", 2, 4, 8)], [value("y")])))
    assert profile.parameters == 3 * 64 + 8 + 8
    assert profile.family is Family.TRANSFORMER


def test_shapes_are_followed_through_the_arithmetic_of_exporters() -> None:
    """A size that is expanded as Equal, Where and ConstantOfShape compute it, and a slice up to the largest number."""
    largest = (1 << 63) - 1
    tensors = [
        tensor("w", (4, 6)), integers("wanted", -1, 3, 4), integers("minus", -1), integers("n", 3),
        integers("from", 1), integers("to", largest), integers("six", 6),
    ]  # fmt: skip
    nodes = [
        node("ConstantOfShape", "n", "ones", value=integers("", 1)), node("Equal", "wanted minus", "open"),
        node("Where", "open ones wanted", "sizes"), node("Expand", "x sizes", "e"), node("MatMul", "e w", "m"),
        node("Shape", "m", "s"), node("Slice", "s from to", "rest"), node("Concat", "six rest", "none", axis=0),
        node("MatMul", "m again", "y"),
    ]  # fmt: skip
    tensors.append(tensor("again", (6, 2)))
    profile = read(model(graph(nodes, tensors, [value("x", "n", 1, 4)], [value("y", "n", 3, 2)])))
    assert profile.flops_per_sample == 2 * 3 * (4 * 6 + 6 * 2)
    assert profile.layers[-1].output_shape == (3, 2)


def test_branches_hide_how_often_layers_run() -> None:
    branch = graph([node("Conv", "x w", "b")], [tensor("w", (2, 1, 3))], [], [value("b")])
    other = graph([node("Conv", "x w", "b")], [tensor("w", (2, 1, 5))], [], [value("b")])
    nodes = [node("If", "flag", "y", then_branch=branch, else_branch=other)]
    inputs = [value("x", "n", 1, 9), value("flag", dtype=BOOL)]
    found = read(model(graph(nodes, [], inputs, [value("y")])))
    assert found.parameters == 16 and "flops_per_sample" in found.unknown


def test_classical_models_of_scikit_learn() -> None:
    linear = node(
        "LinearClassifier", "x", "label p", domain="ai.onnx.ml", coefficients=(0.5,) * 12, intercepts=(1.0,) * 3
    )
    found = read(model(graph([linear], [], [value("x", "n", 4)], [value("label", "n", dtype=I64)])))
    assert (found.parameters, found.family, found.task) == (15, Family.LINEAR, "classification")
    tree = node("TreeEnsembleRegressor", "x", "y", domain="ai.onnx.ml", nodes_values=(0.5,) * 9)
    found = read(model(graph([tree], [], [value("x", "n", 4)], [value("y", "n", 1)])))
    assert (found.family, found.task) == (Family.TREE, "regression") and "parameters" in found.unknown


def single(weight: bytes) -> bytes:
    return model(graph([node("MatMul", "x w", "y")], [weight], [value("x", "n", 4)], [value("y", "n", 4)]))


@pytest.mark.parametrize("location", ["../w", "/etc/passwd", "a/../../w", "C:\\w", "..\\w", "", "a\0b", "./w", "a//b"])
def test_data_outside_the_directory_are_refused(location: str) -> None:
    with pytest.raises(SpecError, match="outside the directory"):
        read(single(elsewhere("w", (4, 4), location)))


def test_data_in_another_file_are_counted_and_never_opened() -> None:
    content = single(elsewhere("w", (4, 4), "model.data"))
    alone = read(content)
    assert (alone.parameters, alone.bytes) == (16, len(content) + 64)
    assert any("model.data, which was not looked at" in note for note in alone.notes)
    assert any("are missing" in note for note in read(content, beside={}).notes)
    assert any("has 3 bytes" in note for note in read(content, beside={"model.data": 3}).notes)
    assert len(read(content, beside={"model.data": 64}).notes) == 1


def test_a_directory_with_one_model_is_read_beside_its_data(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(single(elsewhere("w", (4, 4), "model.data")))
    profile = asyncio.run(identify_folder(tmp_path))
    assert (profile.format, profile.parameters) == ("onnx", 16)
    assert any("are missing" in note for note in profile.notes)
    (tmp_path / "model.data").write_bytes(bytes(64))
    assert len(asyncio.run(identify_folder(tmp_path)).notes) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (single(tensor("w", (4, 4), F32, bytes(60))), "lists 64 bytes"),
        (single(tensor("w", (1 << 40, 4), F32, bytes(4))), "lists 17592186044416 bytes"),
        (single(elsewhere("w", ((1 << 47),) * 32, "w.data")), "impossible shape"),
        (single(message((1, packed((1 << 32, 1 << 31))), (2, F32), (8, "w"))), "impossible shape"),
        (model(graph([node("Relu", "x", "y")], [], [value("x", 1, 1 << 40, 1 << 40)], [value("y")])), "impossible"),
        (single(message((1, packed((-1, 4))), (2, F32), (8, "w"))), "impossible shape"),
        (single(message((1, packed((4, 4))), (2, 99), (8, "w"))), "unknown type"),
        (message((1, 8), (8, message((2, 18)))), "no graph"),
        (model(CONVOLUTIONAL) + field(7, CONVOLUTIONAL), "two graphs"),
        (model(graph([], [tensor("w", (1,)), tensor("w", (1,))], [], [])), "twice"),
        (model(graph([], [], [], [])), "empty"),
        (model(graph([node("Relu", "x", "y", "n" * 5000)], [], [], [])), "has a field of 5000 bytes, the limit is"),
        (b"\x08\x08\x3a" + varint(1 << 60), "reaches beyond"),
        (b"\x08\x08\x3a" + b"\xff" * 11, "no end"),
        (b"\x08\x08\x3b\x3c", "no known kind"),
    ],
)
def test_lies_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        read(content)


def test_graphs_inside_graphs_have_an_end() -> None:
    inner = graph([], [], [], [])
    for _ in range(40):
        inner = graph([node("If", "c", "y", then_branch=inner)], [], [], [])
    with pytest.raises(SpecError, match="deep"):
        read(model(inner))


def test_numbers_in_shapes_cannot_grow_without_end() -> None:
    nodes = [node("Mul", f"v{at} v{at}", f"v{at + 1}") for at in range(200)]
    nodes.append(node("Reshape", "x v200", "y"))
    assert read(model(graph(nodes, [integers("v0", 3, 5)], [value("x", 1, 4)], [value("y")]))).parameters == 0


def test_a_weight_of_two_gigabytes_is_stepped_over(tmp_path: Path) -> None:
    rows = 1 << 21
    weight_head = message((1, packed((rows, 256))), (2, F32), (8, "w"))
    size = rows * 256 * 4
    raw_head = varint(9 << 3 | 2) + varint(size)
    tensor_head = varint(5 << 3 | 2) + varint(len(weight_head) + len(raw_head) + size) + weight_head + raw_head
    rest = graph([node("Gather", "w x", "y")], [], [value("x", "n", 4, dtype=I64)], [value("y")])
    head = message((1, 8), (8, message((2, 18)))) + varint(7 << 3 | 2) + varint(len(tensor_head) + size + len(rest))
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.write(head + tensor_head)
        file.seek(size, 1)
        file.write(rest)
    profile = asyncio.run(identify_file(path))
    assert (profile.format, profile.parameters, profile.family) == ("onnx", rows * 256, Family.EMBEDDING)


def test_a_file_cut_anywhere_gives_the_typed_error() -> None:
    whole = message((1, 8), (8, message((2, 18)))) + field(7, CONVOLUTIONAL)
    assert cut_everywhere(onnx_file.read, whole) == []


@settings(max_examples=300)
@given(st.data())
def test_damaged_files_give_a_profile_or_the_typed_error(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from([model(CONVOLUTIONAL), model(attention())])))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    outcome(onnx_file.read, bytes(content))


@pytest.mark.slow
def test_public_classifiers_and_a_voice_detector() -> None:
    magika = public_file("magika==1.0.3", "magika/models/standard_v3_3/model.onnx", 3_163_737)
    profile = asyncio.run(identify_file(magika))
    assert (profile.parameters, profile.family, profile.input_shape) == (784_214, Family.CNN, (2048,))
    assert profile.requirements.source == "layers"
    silero = public_file("silero_vad==6.2.3", "silero_vad/data/silero_vad.onnx", 2_327_524)
    profile = asyncio.run(identify_file(silero))
    in_torch, fourier = 462_594, 258 * 256 + 130 * 128  # ONNX does not tell a buffer that is convolved with
    assert (profile.parameters, profile.family) == (in_torch + fourier, Family.RNN)
