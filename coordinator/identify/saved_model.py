"""A TensorFlow SavedModel to a ModelProfile: its graph says what it is, the index of its variables how large.

Owns which variables are parameters: those that the saved objects (TensorFlow 2) or a collection (TensorFlow 1) call
trainable; without either, floating-point ones that are no counter, running statistic or state of an optimizer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import BinaryIO

from coordinator.identify.folder import Folder
from coordinator.identify.layers import Description, Layer, describe, family_of_layers
from coordinator.identify.saved_model_graph import GraphVariable, SavedGraph, Signature, read_graph
from coordinator.identify.tensor_bundle import Variable, read_index
from coordinator.identify.tensors import MAX_TENSORS, WHAT_HIVE_TRAINS, check_shape, unusable
from protos.model import ModelProfile

WHY_NOT = f"a TensorFlow SavedModel is not trained by hive: rebuild the model in PyTorch. {WHAT_HIVE_TRAINS}"
GRAPH_FILE, INDEX_FILE = "saved_model.pb", "variables/variables.index"
_DATA_FILES = "variables/variables.data-"
_AGAIN = "the directory is damaged or mixes two models: copy it again"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_NO_PARAMETER = re.compile(
    r"(^|/)(global_step|save_counter|iterations?|beta[12]_power|learning_rate|decay|moving_(mean|variance)|"
    r"optimizer|keras_api|AdamW?(_\d+)?|adam_[mv]|Momentum|RMSProp(_\d+)?|Adagrad|Ftrl(_\d+)?|ExponentialMovingAverage|"
    r"\.OPTIMIZER_SLOT)(/|$)|_CHECKPOINTABLE_OBJECT_GRAPH"
)
_PART = re.compile(r"/part_\d+$")
_GATES = {4: "LSTM", 3: "GRU", 1: "RNN"}
_SEPARATE = ("depthwise_kernel", "pointwise_kernel")


def matches(names: frozenset[str]) -> bool:
    return GRAPH_FILE in names


def read(folder: Folder) -> ModelProfile:
    """The profile of a directory that holds a saved_model.pb. Raises SpecError (MODEL_UNUSABLE)."""
    graph = folder.files.get(GRAPH_FILE)
    if graph is None:
        raise unusable(f"{GRAPH_FILE} is no regular file", "copy the directory again")
    index, sizes = folder.files.get(INDEX_FILE), folder.sizes
    data_bytes = [size for name, size in sizes.items() if name.startswith(_DATA_FILES)]
    stored_bytes = sum(data_bytes) if data_bytes else None
    return identify(graph, sizes[GRAPH_FILE], index, sizes.get(INDEX_FILE, 0), folder.total_bytes, stored_bytes)


def identify(
    graph_file: BinaryIO,
    graph_bytes: int,
    index_file: BinaryIO | None = None,
    index_bytes: int = 0,
    total_bytes: int = 0,
    stored_bytes: int | None = None,
) -> ModelProfile:
    """The profile of a SavedModel from its saved_model.pb and variables/variables.index, None where there is none.
    `total_bytes`: of the whole directory, `stored_bytes`: of the variables in it, None where they are not there. Raises
    SpecError (MODEL_UNUSABLE)."""
    graph = read_graph(graph_file, graph_bytes)
    index = read_index(index_file, index_bytes) if index_file is not None else None
    if index is not None and stored_bytes is not None and sum(each.bytes for each in index) > stored_bytes:
        raise unusable(f"the index lists more than the {stored_bytes} bytes of variables beside it", _AGAIN)
    parameters, exact = _parameters(graph, index)
    layers = _layers(parameters)
    dtypes = {each.dtype for each in parameters} or {each.dtype for each in index or () if each.dtype in _FLOATS}
    signature = _serving(graph.signatures)
    inputs = next(iter(signature.inputs.values()), None) if signature else None
    shape = inputs.shape if inputs else None
    products = sum(graph.operators[name] for name in ("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"))
    attends = bool(graph.operators["Softmax"]) and products > 1
    return describe(
        Description(
            framework="tensorflow",
            file_format="saved_model",
            file_bytes=total_bytes or graph_bytes + index_bytes,
            why_not=WHY_NOT,
            layers=layers,
            parameters=sum(math.prod(each.shape) for each in parameters),
            dtypes=dtypes,
            family=family_of_layers(layers, graph.words, attends),
            task=_task(signature),
            input_shape=shape[1:] if shape and all(size >= 0 for size in shape[1:]) else None,
            unknown=[] if exact else ["parameters"],
            notes=_notes(graph, index, signature, exact),
        )
    )


def _parameters(graph: SavedGraph, index: list[Variable] | None) -> tuple[list[Variable], bool]:
    """The variables that training changes, and whether the files say so."""
    if (found := graph.object_variables()) and any(each.trainable for each in found):
        parameters, exact = _of_graph(each for each in found if each.trainable)
        if index is not None and sum(each.elements for each in parameters) > sum(each.elements for each in index):
            raise unusable("the graph has larger variables than its checkpoint holds", _AGAIN)
        return parameters, exact
    stored = [] if index is None else [each for each in index if _PART.sub("", each.key) == each.key]
    if graph.trainable:
        names = {_PART.sub("", name) for name in graph.trainable}
        if index is not None:
            held = [each for each in stored if each.key in names]
            return held, len(held) == len(names)
        declared = [graph.declared[name] for name in sorted(graph.trainable) if name in graph.declared]
        parameters, exact = _of_graph(declared)
        return parameters, exact and len(declared) == len(graph.trainable)
    guessed = [each for each in stored if each.dtype in _FLOATS and not _NO_PARAMETER.search(each.key)]
    return guessed, index is not None and not guessed


def _of_graph(variables: Iterable[GraphVariable]) -> tuple[list[Variable], bool]:
    found: list[Variable] = []
    exact = True
    for each in variables:
        if each.shape is None or -1 in each.shape:
            exact = False
            continue
        shape = check_shape(each.name, each.shape)
        found.append(Variable(each.name or f"variable_{len(found)}", each.dtype or "F32", shape, 0))
        if len(found) > MAX_TENSORS:
            raise unusable(f"the SavedModel has more than {MAX_TENSORS} variables")
    return found, exact


def _layers(parameters: list[Variable]) -> list[Layer]:
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    counts: dict[str, int] = {}
    for each in parameters:
        prefix, _, leaf = each.key.removesuffix(_VALUE).partition(":")[0].rpartition("/")
        groups.setdefault(prefix, {})[leaf] = each.shape
        counts[prefix] = counts.get(prefix, 0) + math.prod(each.shape)
    return [Layer(prefix or "model", _kind(prefix, group), counts[prefix]) for prefix, group in groups.items()]


def _kind(prefix: str, tensors: Mapping[str, tuple[int, ...]]) -> str:
    """The Keras layer whose variables have these names and shapes, by the names that PyTorch gives them."""
    if recurrent := tensors.get("recurrent_kernel"):
        return _GATES.get(recurrent[-1] // max(recurrent[0], 1), "RNN")
    if any(name in tensors for name in _SEPARATE):
        return "SeparableConv" if "pointwise_kernel" in tensors else "DepthwiseConv"
    name = prefix.lower()
    if "gamma" in tensors or "beta" in tensors:
        return "LayerNorm" if "layer_norm" in name or "layernorm" in name else "BatchNorm"
    if "embeddings" in tensors or any("embedding" in leaf for leaf in tensors):
        return "Embedding"
    weight = tensors.get("kernel", tensors.get("weights", tensors.get("w", ())))
    match len(weight):
        case 2:
            return "Embedding" if "embedding" in name.rpartition("/")[2] else "Linear"
        case 3 if any(word in name for word in ("attention", "query", "key", "value")):
            return "MultiheadAttention"
        case 3 | 4 | 5:
            return f"Conv{len(weight) - 2}d"
        case _:
            return "Module"


def _serving(signatures: list[Signature]) -> Signature | None:
    useful = [each for each in signatures if each.inputs and each.outputs]
    return min(useful, key=lambda each: (each.name != "serving_default", each.name), default=None)


def _task(signature: Signature | None) -> str:
    if signature is None:
        return ""
    if signature.method.endswith("/classify") or {"probabilities", "scores", "class_ids"} & signature.outputs.keys():
        return "classification"
    if signature.method.endswith("/regress"):
        return "regression"
    made = " ".join(each.name for each in signature.outputs.values()).lower()
    return "classification" if "softmax" in made or "sigmoid" in made else ""


def _notes(graph: SavedGraph, index: list[Variable] | None, signature: Signature | None, exact: bool) -> list[str]:
    notes = [f"SavedModel, tags {', '.join(graph.tags[:8]) or 'none'}, TensorFlow {graph.writer or 'not said'}"[:300]]
    if signature is not None:
        for name, kind in list(signature.inputs.items())[:4]:
            sizes = ["?" if size < 0 else str(size) for size in kind.shape or ()]
            notes.append(f"input {name[:80]}: {kind.dtype}[{', '.join(sizes) if kind.shape is not None else '...'}]")
    if index is None:
        notes.append("variables/variables.index is missing: the parameters are those that the graph declares")
    if not exact:
        notes.append("which variables are trained is not said for all of them: the count goes by their names")
    return notes
