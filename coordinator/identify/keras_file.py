"""Keras models, .h5 and .keras: layers from their configuration, parameters from the weights that are really there.

Parameters are what Keras' count_params gives: trained and not trained, moving averages too; the state of the optimizer,
of metrics and of random numbers is left out. Only names, shapes and texts of the HDF5 part are read: see hdf5_file.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO

from coordinator.identify import keras_config
from coordinator.identify.archive import Archive
from coordinator.identify.hdf5_file import Node, read_tree
from coordinator.identify.keras_config import MAX_CONFIG_BYTES, KerasLayer, KerasModel, snake_case
from coordinator.identify.layers import Description, Layer, describe, family_of_layers
from coordinator.identify.tensors import WHAT_HIVE_TRAINS, foreign, unusable
from protos.model import Family, ModelProfile

_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"
_MAX_PACKED_BYTES = 64 * 1024 * 1024
_STATE = frozenset({"optimizer_weights", "optimizer", "metrics", "compile_metrics", "_loss_tracker", "loss_tracker"})
_SEEDS = ("seed_generator", "seed_generator_state")
_WITHOUT_PLACE = ("vars", "_layer_checkpoint_dependencies", "model_weights")
_WHY_NOT = "Keras is not trained by hive: rebuild the model in PyTorch, or export it with a PyTorch backend. "
_KINDS = {
    snake_case(name): name
    for name in (
        "Dense", "Conv1D", "Conv2D", "Conv3D", "Conv2DTranspose", "DepthwiseConv2D", "SeparableConv2D", "Embedding",
        "LSTM", "GRU", "SimpleRNN", "Bidirectional", "BatchNormalization", "LayerNormalization", "MultiHeadAttention",
        "EinsumDense", "GroupNormalization", "Normalization",
    )
}  # fmt: skip


def matches(leaves: frozenset[str]) -> bool:
    """Whether a zip archive is what model.save of Keras 3 writes."""
    return {_CONFIG, _WEIGHTS} <= leaves


def read_archive(archive: Archive) -> ModelProfile:
    """A .keras file. Raises SpecError."""
    prefix = next(name for name in archive.entries if name.endswith(_CONFIG)).removesuffix(_CONFIG)
    model = keras_config.parse(archive.read(prefix + _CONFIG, MAX_CONFIG_BYTES))
    file, size = _entry(archive, prefix + _WEIGHTS)
    return _profile(read_tree(file, size), model, "keras", archive.size)


def read_hdf5(file: BinaryIO, size: int) -> ModelProfile:
    """Any HDF5 file; one that Keras did not write is only named. Raises SpecError."""
    root = read_tree(file, size)
    config = root.text("model_config")
    if config is not None:
        return _profile(root, keras_config.parse(config, root.text("training_config")), "keras_h5", size)
    is_weights = "layer_names" in root.texts or "layer_names0" in root.texts or "keras_version" in root.texts
    if is_weights or "layers" in root.children or "_layer_checkpoint_dependencies" in root.children:
        return _profile(root, KerasModel(), "keras_weights", size)
    count = sum(1 for _ in root.datasets())
    why_not = f"an HDF5 file with {count} datasets that Keras did not write: arrays, not a model. {WHAT_HIVE_TRAINS}"
    return foreign("hdf5", "hdf5", size, why_not)


@dataclass(slots=True)
class _Found:
    """The weights of one layer."""

    name: str
    kind: str
    frozen: bool
    weights: list[tuple[str, Node]] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(node.elements for _, node in self.weights)

    @property
    def not_trained(self) -> int:
        """Moving averages, which are the last two weights where they have numbers for names, and frozen layers."""
        if self.frozen or self.kind == "Normalization":
            return self.parameters
        if self.kind != "BatchNormalization":
            return 0
        moving = [node for path, node in self.weights if "moving_" in path]
        numbered = sorted(self.weights, key=lambda weight: weight[0])
        return sum(node.elements for node in moving or [node for _, node in numbered[-2:]])


def _profile(root: Node, model: KerasModel, file_format: str, size: int) -> ModelProfile:
    found: dict[str, _Found] = {}
    dtypes: set[str] = set()
    for path, node in root.datasets():
        parts = path.split("/")
        if parts[0] in _STATE or any(part in _SEEDS or part.startswith("seed_generator") for part in parts[:-1]):
            continue
        if parts[-1].partition(":")[0] in _SEEDS or node.dtype == "text":
            continue
        name, layer = _owner(parts[:-1], model.layers) if model.layers else (_place(parts[:-1]), None)
        kind = layer.kind if layer is not None else _kind_of(name)
        place = found.setdefault(name, _Found(name, kind, layer is not None and not layer.is_trained))
        place.weights.append((path, node))
        dtypes.add("BF16" if node.text("dtype") == "bfloat16" else node.dtype)
    order = {layer.name: index for index, layer in enumerate(_flat(model.layers))}
    places = sorted(found.values(), key=lambda place: order.get(place.name.rpartition(".")[2], len(order)))
    layers = [Layer(place.name, place.kind, place.parameters) for place in places if place.parameters]
    total = sum(layer.parameters for layer in layers)
    if not layers and not model.layers:
        raise unusable("the Keras file holds no weights and no layers", "save the model again with model.save")
    not_trained = sum(place.not_trained for place in found.values())
    notes = [f"{total - not_trained} parameters are trained, {not_trained} are not (moving averages, frozen layers)"]
    if model.kind:
        names = [layer.kind for layer in _flat(model.layers) if layer.kind != "InputLayer"]
        notes.insert(0, f"architecture: {model.kind} of {', '.join(names[:30])}"[:400])
    if any(name in root.children for name in ("optimizer_weights", "optimizer")):
        notes.append("holds the state of an optimizer, which is not counted")
    return describe(
        Description(
            framework="keras",
            file_format=file_format,
            file_bytes=size,
            why_not=_WHY_NOT + WHAT_HIVE_TRAINS,
            layers=layers,
            parameters=total,
            dtypes=dtypes,
            family=_family(layers, model),
            task=model.task,
            input_shape=model.input_shape,
            unknown=model.code,
            notes=notes,
        )
    )


def _family(layers: list[Layer], model: KerasModel) -> tuple[Family, float]:
    """Of the kinds by PyTorch's names, where those differ."""
    kinds = [Layer(layer.name, "Linear" if layer.kind == "Dense" else layer.kind, layer.parameters) for layer in layers]
    return family_of_layers(kinds, [layer.kind for layer in _flat(model.layers)])


def _place(parts: list[str]) -> str:
    """The layer of a weight in a file without a configuration, by the names of the groups around it."""
    if "layers" in parts:
        return ".".join(name for before, name in pairwise(parts) if before == "layers") or "model"
    return next((part for part in parts if part not in _WITHOUT_PLACE), "model")


def _owner(parts: list[str], layers: list[KerasLayer]) -> tuple[str, KerasLayer | None]:
    """The layer that a weight belongs to: groups are named after layers (.h5) or after classes, numbered (.keras)."""
    named = _named if parts[0] == "model_weights" else _numbered
    names: list[str] = []
    owner: KerasLayer | None = None
    for part in parts:
        below = named(part, layers)
        if below is not None:
            owner = below
            names.append(below.name or part)
            layers = below.layers or []
            if not layers:
                break
    return (".".join(names), owner) if owner is not None else (_place(parts), None)


def _named(part: str, layers: list[KerasLayer]) -> KerasLayer | None:
    return next((layer for layer in layers if layer.name == part), None)


def _numbered(part: str, layers: list[KerasLayer]) -> KerasLayer | None:
    """The layer that the n-th group of its class belongs to."""
    counted: dict[str, int] = {}
    for layer in layers:
        base = snake_case(layer.kind)
        number = counted.get(base, 0)
        counted[base] = number + 1
        if part == (f"{base}_{number}" if number else base):
            return layer
    return _named(part, layers)


def _kind_of(name: str) -> str:
    name = name.rpartition(".")[2]
    base = name.rstrip("0123456789").removesuffix("_")
    return _KINDS.get(name) or _KINDS.get(base) or "Module"


def _flat(layers: list[KerasLayer]) -> Iterator[KerasLayer]:
    for layer in layers:
        yield layer
        yield from _flat(layer.layers or [])


def _entry(archive: Archive, name: str) -> tuple[BinaryIO, int]:
    """An entry of an archive as a file: in place when it is stored as it is, else unpacked, which is bounded."""
    entry = archive.entries[name]
    if entry.compress_type != zipfile.ZIP_STORED:
        data = archive.read(name, _MAX_PACKED_BYTES)
        return io.BytesIO(data), len(data)
    size = archive.stored_bytes(name)
    archive.file.seek(entry.header_offset)
    head = archive.file.read(30)
    if len(head) != 30 or head[:4] != b"PK\x03\x04":
        raise unusable("the zip archive is damaged", "save the model again with model.save")
    name_bytes, extra_bytes = struct.unpack("<HH", head[26:])
    start = entry.header_offset + 30 + name_bytes + extra_bytes
    return io.BufferedReader(_Window(archive.file, start, size)), size


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        count = max(0, min(len(target), self._size - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        target[: len(data)] = data
        self._at += len(data)
        return len(data)
