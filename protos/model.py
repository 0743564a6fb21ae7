"""What identification found out about a model. FLOPs are forward FLOPs of one sample; training is three times that."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Family(StrEnum):
    TRANSFORMER = "transformer"
    CNN = "cnn"
    RNN = "rnn"
    MLP = "mlp"
    GNN = "gnn"
    TREE = "tree"
    LINEAR = "linear"
    EMBEDDING = "embedding"
    UNKNOWN = "unknown"


class Complexity(StrEnum):
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"
    XLARGE = "xlarge"


def complexity_of(parameters: int) -> Complexity:
    """MISSION.md K4: small < 1e6 <= medium < 1e8 <= large < 1e9 <= xlarge."""
    if parameters < 1_000_000:
        return Complexity.SMALL
    if parameters < 100_000_000:
        return Complexity.MEDIUM
    if parameters < 1_000_000_000:
        return Complexity.LARGE
    return Complexity.XLARGE


@dataclass(frozen=True, slots=True)
class LayerProfile:
    name: str
    kind: str  # class name: Linear, Conv2d, ...
    parameters: int
    flops_per_sample: float
    activation_bytes_per_sample: float  # saved for backward
    output_bytes_per_sample: float
    output_shape: tuple[int, ...] = ()  # without the batch dimension
    cut_bytes_per_sample: float | None = None  # crosses when the model is cut after this layer; None: not possible here
    borrowed_parameters: int = 0  # counted at an earlier layer, used here too (tied): a later stage keeps a copy


JOINED = ".."  # between the first and the last of neighbours that one LayerProfile stands for: no module's name has it


def last_of(name: str) -> str:
    """The layer itself, or the last one of those that were joined."""
    return name.rpartition(JOINED)[2]


@dataclass(frozen=True, slots=True)
class Requirements:
    """Needs of a training run, and where each number is from: "layers" (arithmetic over all layers), "table" (of sizes,
    MISSION.md K4), "unknown", or "" where a version before this one did not say."""

    cores: float
    memory_bytes: int
    gpu_memory_bytes: int
    hours: float
    source: str  # of both memories
    cores_source: str = ""
    hours_source: str = ""


@dataclass(frozen=True, slots=True)
class TensorCut:
    """What cutting single layers among `ranks` ranks comes to (tensor parallel), over all layers that are cut.

    `parameters` and `flops_per_sample`: of what each rank holds and computes 1 / ranks. In the passes of a micro-batch,
    forward and backward together, there are `sums` all-reduces and `gathers` all-gathers; their bytes are those of the
    whole tensors that they make, of one sample.
    """

    ranks: int
    layers: int
    parameters: int
    flops_per_sample: float
    sums: int
    summed_bytes_per_sample: float
    gathers: int
    gathered_bytes_per_sample: float


@dataclass(frozen=True, slots=True)
class ModelProfile:
    framework: str
    format: str
    family: Family
    task: str
    parameters: int
    bytes: int
    trainable: bool
    dtypes: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    complexity: Complexity
    layers: tuple[LayerProfile, ...]
    requirements: Requirements
    confidence: float
    unknown: tuple[str, ...] = ()
    digest: str = ""
    why_not: str = ""  # when not trainable: the reason and how to convert
    peak_activation_bytes_per_sample: float = 0.0
    tensor_cuts: tuple[TensorCut, ...] = ()  # one for each number of ranks that was tried and is possible
    why_not_tensor: str = "it was not examined"  # "" when `tensor_cuts` is not empty
    why_not_cut: str = "it was not examined"  # into pipeline stages; "" when `layers` say where it can be cut
    notes: tuple[str, ...] = ()  # what else was seen, in sentences: optimizer state, quantisation, how a file starts

    @property
    def tensor_ranks(self) -> tuple[int, ...]:
        """Among how many ranks its single layers can be cut."""
        return tuple(cut.ranks for cut in self.tensor_cuts)

    @property
    def flops_per_sample(self) -> float:
        return sum(layer.flops_per_sample for layer in self.layers)

    @property
    def activation_bytes_per_sample(self) -> float:
        return sum(layer.activation_bytes_per_sample for layer in self.layers)


def base_requirements(parameters: int, family: Family) -> Requirements:
    """MISSION.md K4 table, used only where the layers are unknown."""
    gib = 1024**3
    cores, memory_gib, gpu_gib, hours = {
        Complexity.SMALL: (2, 4, 2, 0.5),
        Complexity.MEDIUM: (4, 16, 8, 2.0),
        Complexity.LARGE: (8, 32, 16, 8.0),
        Complexity.XLARGE: (16, 64, 32, 24.0),
    }[complexity_of(parameters)]
    memory = float(memory_gib)
    if family is Family.TRANSFORMER:
        memory *= 1.5
        gpu_gib = max(gpu_gib, 8)
    elif family is Family.CNN:
        gpu_gib = max(gpu_gib, 4)
    return Requirements(float(cores), int(memory * gib), gpu_gib * gib, hours, "table", "table", "table")


_TRAINED_BYTES = 16  # per parameter: fp32 weights and gradients, and Adam's two moments
_WORKER_BYTES = 288 * 10**6  # torch itself and what a first step brings along
_BATCH = 32


def layer_requirements(parameters: int, family: Family, layers: tuple[LayerProfile, ...]) -> Requirements:
    """Training with Adam in batches of 32, from parameters and activations of every layer. Cores and hours stay the
    table's: how many samples there will be is not the model's to say."""
    table = base_requirements(parameters, family)
    activations = sum(layer.activation_bytes_per_sample for layer in layers)
    largest = max((layer.output_bytes_per_sample for layer in layers), default=0.0)
    need = int(_TRAINED_BYTES * parameters + _BATCH * (1.25 * activations + 2 * largest))
    return Requirements(table.cores, need + _WORKER_BYTES, need, table.hours, "layers", "table", "table")
