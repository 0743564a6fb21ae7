"""The models that the onnx package brings for its own tests: all of them identified, with the parameters that the
package's own reader of its format counts, and the family that their operators make them."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import math
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf.runtime_version import VersionError
from public_models import all_public_files, public_file

from coordinator.identify import parse
from coordinator.identify.confine import identify_path
from protos.model import Family, ModelProfile

pytestmark = pytest.mark.slow

PACKAGE = "onnx==1.23.2"
NETWORKS = {  # the real ones among them, as their papers and libraries know them
    "bvlc_alexnet": 60_965_224, "densenet121": 7_978_856, "inception_v1": 6_998_552, "inception_v2": 11_194_984,
    "resnet50": 25_557_032, "shufflenet": 1_393_320, "squeezenet": 1_235_496, "vgg19": 143_667_240,
    "zfnet512": 87_250_536,
}  # fmt: skip
WEIGHTS = {  # where the specification of an operator has what is learned
    "Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (1, 2), "BatchNormalization": (1, 2), "PRelu": (1,),
    "MatMul": (0, 1), "Gather": (0,), "InstanceNormalization": (1, 2),
}  # fmt: skip
ADDED = {"test_operator_params": 4}  # a parameter of 2 x 2 that is only added
SAME = ("Transpose", "Unsqueeze", "Reshape")  # the tensor of the file under another name
FLOATS, INTEGERS = (1, 10, 11, 16), 7  # TensorProto.DataType


@functools.cache
def messages() -> ModuleType:
    """The package's own reader of its format, out of its wheel: the package itself need not be installed."""
    spec = importlib.util.spec_from_file_location("onnx_ml_pb2", public_file(PACKAGE, "onnx/onnx_ml_pb2.py", -1))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was made for an older protobuf than may be installed
        try:
            spec.loader.exec_module(module)
        except VersionError as error:
            pytest.skip(f"the reader of {PACKAGE} needs another protobuf: {error}")
    return module


def graph_of(path: Path) -> Any:
    return messages().ModelProto.FromString(path.read_bytes()).graph


def learned(graph: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the floating-point tensors that an operator takes as weights, by name."""
    stored = {each.name: tuple(each.dims) for each in graph.initializer if each.data_type in FLOATS}
    integers = {
        each.name: tuple(map(int, np.frombuffer(each.raw_data, "<i8") if each.raw_data else each.int64_data))
        for each in graph.initializer
        if each.data_type == INTEGERS
    }
    origin = {name: name for name in stored}
    taken = set()
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in integers:  # filled when the model starts
            stored[node.output[0]] = integers[node.input[0]]
            origin[node.output[0]] = node.output[0]
        if node.op_type in SAME and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        places = WEIGHTS.get(node.op_type, ())
        taken |= {origin[name] for place, name in enumerate(node.input) if place in places and name in origin}
    return {name: stored[name] for name in taken}


def test_the_real_networks_are_exact_through_the_confined_child() -> None:
    paths = {path.stem.removeprefix("light_"): path for path in all_public_files(PACKAGE, ".onnx")}
    assert set(NETWORKS) <= set(paths)
    for name, parameters in NETWORKS.items():
        counted = sum(map(math.prod, learned(graph_of(paths[name])).values()))
        profile = asyncio.run(identify_path(paths[name]))
        assert (profile.parameters, profile.family) == (parameters, Family.CNN) and parameters == counted, name
        assert (profile.format, profile.requirements.source) == ("onnx", "layers"), name
        assert not {"parameters", "family"} & set(profile.unknown), name


def family_by_operators(graph: Any, weights: dict[str, tuple[int, ...]]) -> Family:
    """Of a model with one operator or a few."""
    kinds = {node.op_type for node in graph.node}
    if kinds & {"Conv", "ConvTranspose"}:
        return Family.CNN
    if "Gather" in kinds and weights:
        return Family.EMBEDDING
    if kinds & {"Gemm", "MatMul"} and weights:
        return Family.LINEAR
    return Family.UNKNOWN


def read(path: Path) -> ModelProfile:
    with path.open("rb") as file:
        return parse.identify(file)


def test_every_model_has_its_parameters_and_family() -> None:
    paths = all_public_files(PACKAGE, ".onnx")
    assert len(paths) == 149
    for path in paths:
        profile, graph = read(path), graph_of(path)
        weights = learned(graph)
        assert profile.format == "onnx", path
        assert profile.parameters == sum(map(math.prod, weights.values())) + ADDED.get(path.parent.name, 0), path
        assert profile.family is family_by_operators(graph, weights), path
