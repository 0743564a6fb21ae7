"""An ONNX file to a ModelProfile: its graph, and what onnx_layers and onnx_shapes make of it.

Owns the batch (the first dimension of the first input), the task that the outputs speak for, and what is said of data
in other files: they are named and measured by their dimensions, never opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import BinaryIO

from coordinator.identify.folder import Folder
from coordinator.identify.layers import Description, describe, family_of_layers
from coordinator.identify.onnx_graph import Graph, OnnxModel, OnnxTensor, Value, read_model
from coordinator.identify.onnx_layers import LayerFinder
from coordinator.identify.onnx_shapes import Shape, Shapes
from coordinator.identify.tensors import WHAT_HIVE_TRAINS, check_shape, unusable
from protos.model import Family, ModelProfile

WHY_NOT = f"ONNX is for inference: give the PyTorch source it was exported from. {WHAT_HIVE_TRAINS}"
_SAYS_NOTHING = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "ZipMap", "Dropout")
_MAX_NOTED = 8


def looks_like(head: bytes, size: int) -> bool:
    """A ModelProto starts with ir_version (field 1, a small number); then comes one of its other fields."""
    starts = len(head) > 3 and head[0] == 0x08 and 0 < head[1] < 32
    return starts and head[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)


def read(file: BinaryIO, size: int, beside: Mapping[str, int] | None = None) -> ModelProfile:
    """The profile of an ONNX file. `beside`: the sizes of the files in its directory by name, where they are known.
    Raises SpecError (MODEL_UNUSABLE)."""
    model = read_model(file, size)
    graph = model.graph
    assert graph is not None  # read_model refuses a file without one
    finder = LayerFinder(model)
    finder.walk(graph)
    if not finder.nodes and not graph.tensors:
        raise unusable("the ONNX graph is empty", "export the model again")
    batch, shapes, input_shape = _inputs(graph)
    known = Shapes(shapes, graph.tensors)
    known.follow(graph)
    flops_known, activations_known = finder.measure(graph, known, batch)
    external = [tensor for each in graph.everywhere() for tensor in each.tensors.values() if tensor.external]
    attends = finder.attends()
    family = family_of_layers(finder.layers, model.function_names, attends)
    return describe(
        Description(
            framework="onnx",
            file_format="onnx",
            file_bytes=size + sum(tensor.bytes for tensor in external),
            why_not=WHY_NOT,
            layers=finder.layers,
            parameters=finder.parameters,
            dtypes=finder.dtypes or {tensor.dtype for tensor in graph.tensors.values()},
            family=family,
            task=_task(graph, known, family[0]),
            input_shape=input_shape,
            flops_known=flops_known,
            activations_known=activations_known,
            unknown=["parameters"] if finder.without_count else [],
            notes=[*_said(model, graph, input_shape), *_elsewhere(graph, external, beside)],
        )
    )


def is_folder(names: frozenset[str]) -> bool:
    """One model, perhaps with its data in files beside it."""
    return sum(name.endswith(".onnx") and "/" not in name for name in names) == 1


def read_folder(folder: Folder) -> ModelProfile:
    """The profile of the one ONNX file in a directory. Raises SpecError (MODEL_UNUSABLE)."""
    for name, file in folder.files.items():
        if name.endswith(".onnx"):
            return read(file, folder.sizes[name], folder.sizes)
    raise unusable("the ONNX file in the directory is no regular file", "name the file itself")


def _inputs(graph: Graph) -> tuple[int, dict[str, Shape], Shape | None]:
    """The batch that the graph is fixed to (1: any), known shapes by name, and the first input's without the batch."""
    given = [value for value in graph.inputs if value.name not in graph.tensors and value.dimensions is not None]
    first = given[0].dimensions if given else None
    batch, symbol = 1, ""
    if first:
        if isinstance(first[0], int):
            batch = max(first[0], 1)
        else:
            symbol = first[0]
    shapes: dict[str, Shape] = {}
    for value in (*graph.values, *graph.outputs, *given):
        shape = _fixed(value, symbol, is_input=value in given)
        if shape is not None:
            shapes[value.name] = shape
    found = shapes.get(given[0].name) if given else None
    return batch, shapes, found[1:] if found else None


def _fixed(value: Value, symbol: str, is_input: bool) -> Shape | None:
    """The dimensions as numbers, with one sample where the batch is open; None when another one is open too."""
    found = []
    for at, size in enumerate(value.dimensions if value.dimensions is not None else ("?",)):
        if isinstance(size, int):
            found.append(size)
        elif (size and size == symbol) or (is_input and at == 0):
            found.append(1)
        else:
            return None
    return check_shape(value.name, found)


def _task(graph: Graph, known: Shapes, family: Family) -> str:
    made_by = {name: node for node in graph.nodes for name in node.outputs}
    for output in graph.outputs[:2]:
        node = made_by.get(output.name)
        for _ in range(8):
            if node is None or node.kind not in _SAYS_NOTHING or not node.inputs:
                break
            node = made_by.get(node.inputs[0])
        kind = node.kind if node else ""
        if kind in ("Softmax", "LogSoftmax", "Sigmoid", "ArgMax") or kind.endswith("Classifier"):
            return "classification"
        if kind.endswith("Regressor"):
            return "regression"
        name = output.name.lower()
        rank = len(output.dimensions) if output.dimensions is not None else len(known.shapes.get(output.name, ()))
        if "logits" in name:
            return "language_model" if rank == 3 and family in (Family.TRANSFORMER, Family.RNN) else "classification"
        if name in ("last_hidden_state", "sentence_embedding", "token_embeddings", "pooler_output"):
            return "features"
    return ""


def _said(model: OnnxModel, graph: Graph, input_shape: Shape | None) -> Iterator[str]:
    operators = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(model.operators.items())[:8])
    producer = f", written by {model.producer}" if model.producer else ""
    yield f"ONNX format {model.ir_version}, operators {operators}{producer}"[:400]
    if input_shape is not None:
        return
    for value in [each for each in graph.inputs if each.name not in graph.tensors][:_MAX_NOTED]:
        sizes = ", ".join(str(size) or "?" for size in value.dimensions or ())
        what = f"{value.dtype}[{sizes}]" if value.dimensions is not None else value.dtype or "not a tensor"
        yield f"input {value.name[:80]}: {what[:200]}"


def _elsewhere(graph: Graph, external: list[OnnxTensor], beside: Mapping[str, int] | None) -> Iterator[str]:
    """What is said of data that do not lie in the file."""
    needed: dict[str, int] = {}
    for tensor in external:
        needed[tensor.external] = needed.get(tensor.external, 0) + tensor.bytes
    for name, count in list(needed.items())[:_MAX_NOTED]:
        if beside is None:
            yield f"{count} bytes of weights lie beside it in {name}, which was not looked at"
        elif name not in beside:
            yield f"{count} bytes of weights are missing: they lie in {name}, which is not there"
        elif beside[name] < count:
            yield f"{name} beside it has {beside[name]} bytes, the weights in it need {count}"
    missing = [tensor.name for tensor in graph.tensors.values() if tensor.missing]
    if missing:
        yield f"the data of {len(missing)} tensors are missing, e.g. of {missing[0][:80]!r}"
