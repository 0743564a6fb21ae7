"""What a weights file holds, as names, types and sizes; and the ModelProfile that follows from them alone.

Owns the reading of tensor names: buffers, families, layers, and weights that quantisation packed. A weights file has no
architecture, so its FLOPs and activations stay unknown and its requirements come from the table. Invariants: a shared
tensor counts once; no shape has MAX_ELEMENTS elements, so that sums of sizes can be shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from protos.errors import ErrorCode, SpecError
from protos.model import Family, LayerProfile, ModelProfile, Requirements, base_requirements, complexity_of
from protos.printable import printable

MAX_TENSORS = 200_000
MAX_NAME_CHARACTERS = 512
MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**63
MAX_LAYERS_LISTED = 4_000

WHAT_HIVE_TRAINS = (
    "hive trains a Python entry point: model: {source: model.py:build}, where build() returns a torch.nn.Module, "
    "optionally starting from model.weights: a .safetensors file or a PyTorch state dict; a Hugging Face directory; or "
    "a .pt2 file of torch.export"
)

_BUFFERS = (
    "running_mean", "running_var", "num_batches_tracked", "position_ids", "inv_freq", "masked_bias", "freqs_cis",
)  # fmt: skip
_NUMBERS = ("F64", "F32", "F16", "BF16", "F8", "F6", "F4", "C")  # types of what is learned: floating-point and complex
_MASK = re.compile(r"(attn|attention)\.bias$")
_NARROW = ("F6", "F4")  # that only quantised weights have
_BYTE_WIDE = "F8"  # that some models are cast to and others quantised to
_INTEGERS = ("I", "U")
_PACKED = re.compile(r"(^|[._])(q?weight|blocks|packed)$")  # of a tensor of integers
_SCALE = re.compile(r"(^|[._])weight_scale(_inv)?$")  # beside weights of 8 bits

# how the layers of PyTorch Geometric and DGL name what they hold
_GRAPH_LAYER = re.compile(r"(^|[._])(gnn|gcn|gat|rgcn|graphsage|(gcn|gat|gatv2|rgcn|gin|sage|graph)conv)s?\d*([._]|$)")
_GRAPH_ATTENTION = ({"att_src", "att_dst"}, {"attn_l", "attn_r"})
_GRAPH_SIBLINGS = {"lin_l": "lin_r", "lin_rel": "lin_root", "fc_neigh": "fc_self"}
_CONVOLVES = re.compile(r"(^|[._])convs?[_.]?\d*$")


def unusable(message: str, hint: str = "") -> SpecError:
    return SpecError(message, hint or WHAT_HIVE_TRAINS, code=ErrorCode.MODEL_UNUSABLE)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One named tensor. `identity` is equal for two names of one stored tensor."""

    name: str
    dtype: str  # safetensors' names: F32, BF16, I64, ...
    shape: tuple[int, ...]
    bytes: int
    identity: Hashable = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_parameter(self) -> bool:
        leaf = self.name.rpartition(".")[2]
        return self.dtype.startswith(_NUMBERS) and leaf not in _BUFFERS and not self._is_mask

    @property
    def is_packed(self) -> bool:
        """Whether quantisation made it: its elements are not the parameters of the model."""
        integers = self.dtype.startswith(_INTEGERS) and len(self.shape) > 1
        return self.dtype.startswith(_NARROW) or (integers and _PACKED.search(self.name) is not None)

    @property
    def is_scale(self) -> bool:
        return _SCALE.search(self.name) is not None

    @property
    def _is_mask(self) -> bool:
        """The causal mask that GPT-2 and its kin keep as `attn.bias`: of all positions against all."""
        square = len(self.shape) == 4 and self.shape[:2] == (1, 1) and self.shape[2] == self.shape[3] > 1
        return square and _MASK.search(self.name) is not None


@dataclass(slots=True)
class _Group:
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: int = 0


def check_shape(name: str, shape: Iterable[object]) -> tuple[int, ...]:
    """A shape of plain non-negative integers within bounds; raises SpecError otherwise."""
    found = tuple(shape)
    sizes = tuple(size for size in found if type(size) is int and 0 <= size < 2**48)
    if sizes != found or len(sizes) > MAX_DIMENSIONS or math.prod(sizes) >= MAX_ELEMENTS:
        raise unusable(f"tensor {name[:80]!r} has an impossible shape", "the file is damaged: write it again")
    return sizes


def profile_of(
    tensors: Iterable[TensorInfo],
    *,
    framework: str,
    file_format: str,
    file_bytes: int,
    why_not: str,
    unknown: tuple[str, ...] = (),
) -> ModelProfile:
    """The profile of a file of weights. Raises SpecError when it holds no tensor."""
    groups: dict[str, _Group] = {}
    dtypes: set[str] = set()
    packed: TensorInfo | None = None
    scale: TensorInfo | None = None
    seen: set[Hashable] = set()
    total = 0
    for tensor in tensors:
        prefix, _, leaf = tensor.name.rpartition(".")
        group = groups.setdefault(prefix, _Group())
        group.tensors[leaf] = tensor.shape
        dtypes.add(tensor.dtype)
        packed = packed or (tensor if tensor.is_packed else None)
        scale = scale or (tensor if tensor.is_scale else None)
        identity = tensor.identity if tensor.identity is not None else tensor.name
        if tensor.is_parameter and identity not in seen:
            seen.add(identity)
            group.parameters += tensor.elements
            total += tensor.elements
    if not groups:
        raise unusable("the file holds no tensors", "check that the right file was named")
    if packed is None and any(dtype.startswith(_BYTE_WIDE) for dtype in dtypes):
        packed = scale
    kinds = {prefix: kind_of(prefix, group.tensors) for prefix, group in groups.items()}
    layers = tuple(
        LayerProfile(prefix or "model", kinds[prefix], group.parameters, 0.0, 0.0, 0.0)
        for prefix, group in groups.items()
        if group.parameters
    )
    family, confidence = family_of(groups, kinds)
    task = task_of(groups)
    return ModelProfile(
        framework=framework,
        format=file_format,
        family=family,
        task=task or "unknown",
        parameters=total,
        bytes=file_bytes,
        trainable=False,
        dtypes=tuple(sorted(dtypes)),
        input_shape=None,
        complexity=complexity_of(total),
        layers=layers[:MAX_LAYERS_LISTED],
        requirements=base_requirements(total, family),
        confidence=confidence,
        unknown=(
            *(() if task else ("task",)),
            "input_shape",
            "flops_per_sample",
            "activation_bytes_per_sample",
            *(("parameters",) if packed else ()),
            *unknown,
        ),
        why_not=why_not,
        notes=(_said_of(packed),) if packed else (),
    )


def complexity_told(profile: ModelProfile) -> ModelProfile:
    """The same, with the complexity unknown where the parameters are: it is their class."""
    if "parameters" not in profile.unknown or "complexity" in profile.unknown:
        return profile
    return replace(profile, unknown=(*profile.unknown, "complexity"))


def _said_of(packed: TensorInfo) -> str:
    sizes = ", ".join(map(str, packed.shape))
    what = f"{printable(packed.name[:80])} is {packed.dtype}[{sizes}]"
    return f"quantised weights, e.g. {what}: how many parameters were packed is not known, and their scales are counted"


def task_of(groups: Iterable[str]) -> str:
    """language_model or classification where a layer has a name that only such a head has; "" otherwise."""
    parts = {part for prefix in groups for part in prefix.lower().split(".")}
    if "lm_head" in parts or {"cls", "predictions"} <= parts:
        return "language_model"
    return "classification" if "classifier" in parts else ""


def kind_of(prefix: str, tensors: Mapping[str, tuple[int, ...]]) -> str:
    """The layer that has tensors of these names and shapes; "Module" when nothing fits."""
    last = prefix.rpartition(".")[2].lower()
    recurrent = next((leaf for leaf in tensors if leaf.startswith("weight_ih")), None)
    if recurrent is not None:
        hidden = tensors.get(recurrent.replace("weight_ih", "weight_hh"), (0, 1))
        gates = tensors[recurrent][0] // max(hidden[-1], 1) if tensors[recurrent] and hidden else 0
        return {4: "LSTM", 3: "GRU"}.get(gates, "RNN")
    if "in_proj_weight" in tensors:
        return "MultiheadAttention"
    if "running_mean" in tensors:
        return "BatchNorm"
    weight = tensors.get("weight")
    if weight is None:
        return "Module"
    match len(weight):
        case 1:
            return "LayerNorm"
        case 2:
            embeds = "bias" not in tensors and ("emb" in prefix.lower() or last in ("wte", "wpe", "tok", "pos"))
            return "Embedding" if embeds else "Linear"
        case 3 | 4 | 5:
            return f"Conv{len(weight) - 2}d"
        case _:
            return "Module"


def family_of(groups: Mapping[str, _Group], kinds: Mapping[str, str]) -> tuple[Family, float]:
    """Family and how sure it is, from names and kinds of layers alone."""
    names = " ".join(groups).lower()
    if _of_a_graph(groups):
        return Family.GNN, 0.6
    present = set(kinds.values())
    linear = sum(kind == "Linear" for kind in kinds.values())
    if "MultiheadAttention" in present or "attn" in names or "attention" in names:
        return Family.TRANSFORMER, 0.9
    if {"Embedding", "LayerNorm"} <= present:
        return Family.TRANSFORMER, 0.7
    if not present & {"LSTM", "GRU", "RNN", "Embedding"} and _convolves_over_a_graph(groups):
        return Family.GNN, 0.6
    if any(kind.startswith("Conv") for kind in present):
        return Family.CNN, 0.8
    if present & {"LSTM", "GRU", "RNN"}:
        return Family.RNN, 0.9
    if "Embedding" in present:
        return Family.EMBEDDING, 0.6
    if linear == 1 and len(kinds) == 1:
        return Family.LINEAR, 0.8
    if linear:
        return Family.MLP, 0.7
    return Family.UNKNOWN, 0.3


def _of_a_graph(groups: Mapping[str, _Group]) -> bool:
    """Whether there are layers that pass messages along the edges of a graph, by what they and their parts are called.
    Their weights have two dimensions at most: a `gcn` with more is one of images."""
    named = [group for prefix, group in groups.items() if _GRAPH_LAYER.search(prefix.lower())]
    if named and all(len(group.tensors.get("weight", ())) < 3 for group in named):
        return True
    if any(pair <= group.tensors.keys() for pair in _GRAPH_ATTENTION for group in groups.values()):
        return True
    for prefix in groups:
        parent, _, last = prefix.rpartition(".")
        beside = _GRAPH_SIBLINGS.get(last)
        if beside is not None and f"{parent}.{beside}".lstrip(".") in groups:
            return True
    return False


def _convolves_over_a_graph(groups: Mapping[str, _Group]) -> bool:
    """A convolution with a weight of two dimensions does: those over images and texts have three at least."""
    for prefix, group in groups.items():
        parent, _, last = prefix.rpartition(".")
        within = last == "lin" and parent in groups and groups[parent].tensors.keys() == {"bias"}
        convolves = _CONVOLVES.search(parent if within else prefix) is not None
        if convolves and len(group.tensors.get("weight", ())) == 2 and group.tensors.keys() <= {"weight", "bias"}:
            return True
    return False


def foreign(
    framework: str,
    file_format: str,
    file_bytes: int,
    why_not: str,
    *,
    architecture: str = "",
    notes: tuple[str, ...] = (),
) -> ModelProfile:
    """A format that is named but not read: nothing about its inside is claimed."""
    return ModelProfile(
        framework=framework,
        format=file_format,
        family=Family.UNKNOWN,
        task="unknown",
        parameters=0,
        bytes=file_bytes,
        trainable=False,
        dtypes=(),
        input_shape=None,
        complexity=complexity_of(0),
        layers=(LayerProfile("model", architecture, 0, 0.0, 0.0, 0.0),) if architecture else (),
        requirements=Requirements(0.0, 0, 0, 0.0, "unknown", cores_source="unknown", hours_source="unknown"),
        confidence=0.5,
        unknown=("parameters", "layers", "family", "task", "input_shape", "requirements"),
        why_not=why_not,
        notes=notes,
    )
