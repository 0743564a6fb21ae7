"""The ModelProfile of a file that describes its layers itself, instead of only naming tensors.

Owns how layers are collected while a graph is walked, which family their kinds and parameters speak for, and that
requirements are exact arithmetic ("layers") only when every layer that computes has its FLOPs and activations.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from coordinator.identify.tensors import MAX_LAYERS_LISTED, MAX_NAME_CHARACTERS, TensorInfo
from protos.model import (
    Family,
    LayerProfile,
    ModelProfile,
    base_requirements,
    complexity_of,
    layer_requirements,
)
from protos.printable import printable

_GRAPH_KINDS = (
    "GCNConv", "SAGEConv", "GATConv", "GATv2Conv", "GINConv", "MessagePassing", "GraphConv", "RGCNConv",
    "GraphConvolution", "GCNLayer",
)  # fmt: skip
_ATTENTION_WORDS = ("attention", "attn", "transformer", "encoderlayer", "decoderlayer")


@dataclass(slots=True)
class Layer:
    """A layer under construction."""

    name: str
    kind: str
    parameters: int = 0
    flops: float = 0.0
    activation_bytes: float = 0.0
    output_bytes: float = 0.0
    output_shape: tuple[int, ...] = ()
    borrowed: int = 0  # parameters counted at an earlier layer

    def count(self, tensor: TensorInfo, counted: set[Hashable]) -> None:
        """One of its parameters; `counted` are the identities of those that an earlier layer has already."""
        if tensor.identity in counted:
            self.borrowed += tensor.elements
        else:
            counted.add(tensor.identity)
            self.parameters += tensor.elements

    def profile(self) -> LayerProfile:
        return LayerProfile(
            _short(self.name), _short(self.kind), self.parameters, self.flops,
            self.activation_bytes, self.output_bytes, self.output_shape, borrowed_parameters=self.borrowed,
        )  # fmt: skip


@dataclass(slots=True)
class Description:
    """What a reader found out. `None` and empty mean that the file does not say."""

    framework: str
    file_format: str
    file_bytes: int
    why_not: str
    layers: list[Layer] = field(default_factory=list)
    parameters: int = 0
    dtypes: set[str] = field(default_factory=set)
    family: tuple[Family, float] = (Family.UNKNOWN, 0.3)
    task: str = ""
    input_shape: tuple[int, ...] | None = None
    flops_known: bool = False
    activations_known: bool = False
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trainable: bool = False


def describe(found: Description) -> ModelProfile:
    """The profile that follows; what `found` leaves open is listed as unknown, and its numbers are zero."""
    open_ends = {
        "task": not found.task,
        "input_shape": found.input_shape is None,
        "flops_per_sample": not found.flops_known,
        "activation_bytes_per_sample": not found.activations_known,
        "family": found.family[0] is Family.UNKNOWN,
    }
    for layer in found.layers:
        if not found.flops_known:
            layer.flops = 0.0
        if not found.activations_known:
            layer.activation_bytes = 0.0
    layers = tuple(layer.profile() for layer in found.layers)
    family, confidence = found.family
    exact = found.flops_known and found.activations_known and bool(layers)
    if exact:
        requirements = layer_requirements(found.parameters, family, layers)
    else:
        requirements = base_requirements(found.parameters, family)
    unknown = [name for name, is_open in open_ends.items() if is_open]
    return ModelProfile(
        framework=found.framework,
        format=found.file_format,
        family=family,
        task=found.task or "unknown",
        parameters=found.parameters,
        bytes=found.file_bytes,
        trainable=found.trainable,
        dtypes=tuple(sorted(found.dtypes)),
        input_shape=found.input_shape,
        complexity=complexity_of(found.parameters),
        layers=layers[:MAX_LAYERS_LISTED],
        requirements=requirements,
        confidence=confidence,
        unknown=tuple(dict.fromkeys([*unknown, *found.unknown])),
        why_not=found.why_not,
        notes=tuple(map(printable, found.notes)),
    )


def family_of_layers(layers: Iterable[Layer], words: Iterable[str] = (), attends: bool = False) -> tuple[Family, float]:
    """Family and how sure it is, from the kinds of layers and how many parameters each kind has.

    `words` are the names of classes and scopes of the file; `attends` says that a softmax lies between two products of
    computed values. Of convolutions and recurrent layers the latter decide from a quarter of the parameters on: their
    steps wait for each other.
    """
    by_kind: dict[str, int] = {}
    count = linear = 0
    for layer in layers:
        linear += layer.kind in ("Linear", "LinearClassifier", "LinearRegressor", "SVM")
        by_kind[layer.kind] = by_kind.get(layer.kind, 0) + layer.parameters
        count += 1
    said = list(words)
    text = " ".join(said).lower()
    if any(kind in by_kind or kind in said for kind in _GRAPH_KINDS) or "edge_index" in text:
        return Family.GNN, 0.9
    if attends or any("attention" in kind.lower() for kind in by_kind):
        return Family.TRANSFORMER, 0.9
    if any(word in text for word in _ATTENTION_WORDS):
        return Family.TRANSFORMER, 0.8
    convolutions = _share(by_kind, ("Conv", "DepthwiseConv", "SeparableConv"))
    recurrent = _share(by_kind, ("LSTM", "GRU", "RNN", "SimpleRNN", "Bidirectional"))
    if recurrent is not None and 4 * recurrent >= recurrent + (convolutions or 0):
        return Family.RNN, 0.9
    if convolutions is not None:
        return Family.CNN, 0.9
    if any(kind.startswith("Tree") for kind in by_kind):
        return Family.TREE, 0.9
    if any(kind.startswith("Embedding") for kind in by_kind) and linear < 2:
        return Family.EMBEDDING, 0.7
    if linear == 1 and count == 1:
        return Family.LINEAR, 0.8
    return (Family.MLP, 0.8) if linear else (Family.UNKNOWN, 0.3)


def task_of_class(name: str) -> str:
    """What the name of a model's class says about its head; "" when it says nothing."""
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
        return "language_model"
    if name.endswith(("Classification", "Classifier")):
        return "classification"
    return "regression" if name.endswith(("Regression", "Regressor")) else ""


def _short(name: str) -> str:
    """A name that a stranger chose."""
    return printable(name[:MAX_NAME_CHARACTERS])[:MAX_NAME_CHARACTERS]


def _share(by_kind: Mapping[str, int], starts: tuple[str, ...]) -> int | None:
    """The parameters of the kinds whose names start so, None when there is no such kind."""
    found = [count for kind, count in by_kind.items() if kind.startswith(starts)]
    return sum(found) if found else None
