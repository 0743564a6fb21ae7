"""A GGUF file (llama.cpp, versions 1 to 3, both byte orders): its metadata and the list of its tensors.

Owns the layout and its bounds: counts, lengths of texts and arrays, and that each tensor's bytes, by the block size of
its quantised type, lie inside the file and do not overlap. No tensor is read. Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

from coordinator.identify.layers import Description, Layer, describe
from coordinator.identify.tensors import (
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
    WHAT_HIVE_TRAINS,
    check_shape,
    kind_of,
    unusable,
)
from protos.model import Family, ModelProfile

MAGIC = b"GGUF"
WHY_NOT = f"GGUF is for inference, usually quantised: start from the original safetensors. {WHAT_HIVE_TRAINS}"
MAX_KEYS = 65_536
MAX_TEXT_BYTES = 16 * 1024 * 1024  # a chat template; longer texts are no metadata
MAX_ARRAY = 2_000_000  # a vocabulary has some hundred thousand texts
_MAX_NESTING = 4
_DAMAGED = "the file is damaged or was cut short: copy it again"
_KEPT_BYTES = 1024
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# type number -> name, numbers in a block, bytes of a block
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
_RECURRENT = ("mamba", "rwkv", "arwkv")
_CONVOLUTIONAL = ("wavtokenizer", "sd", "flux", "unet", "esrgan")
_EMBEDS = ("bert", "nomic-bert", "jina-bert", "t5encoder", "gemma-embedding", "modern-bert", "neo-bert")
_NO_PARAMETERS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]  # as ggml writes it: the fastest dimension first
    offset: int
    bytes: int


@dataclass(slots=True)
class _Reader:
    """Numbers and texts one behind the other; raises SpecError at the end of the file."""

    file: BinaryIO
    size: int
    order: str = "<"
    version: int = 3
    at: int = 0
    window: bytes = b""
    window_start: int = 0
    arrays_left: int = MAX_ARRAY
    metadata: dict[str, int | float | bool | str] = field(default_factory=dict)

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise unusable(f"the GGUF file ends at byte {self.size}, inside its header", _DAMAGED)
        start = self.at - self.window_start
        if start < 0 or start + count > len(self.window):
            self.file.seek(self.at)
            self.window, self.window_start, start = self.file.read(max(count, 65536)), self.at, 0
            if len(self.window) < count:
                raise unusable("the GGUF file is shorter than it says", _DAMAGED)
        self.at += count
        return self.window[start : start + count]

    def number(self, code: str) -> int | float | bool:
        found: int | float | bool = struct.unpack(self.order + code, self.take(struct.calcsize(self.order + code)))[0]
        return found

    def count(self, limit: int, what: str) -> int:
        """A length: 32 bits wide in version 1, 64 later."""
        found = int(self.number("I" if self.version == 1 else "Q"))
        if found > limit:
            raise unusable(f"the GGUF file claims {what} of {found}, over the limit of {limit}", _DAMAGED)
        return found

    def text(self, limit: int) -> str:
        return self.take(self.count(limit, "a text")).decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise unusable(f"the GGUF file ends at byte {self.size}, inside its header", _DAMAGED)
        self.at += count

    def value(self, kind: int, depth: int = 0) -> int | float | bool | str | None:
        """A value of the metadata; None for arrays and long texts, which are stepped over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            length = self.count(MAX_TEXT_BYTES, "a text")
            if length <= _KEPT_BYTES:
                return self.take(length).decode("utf-8", "replace")
            self.skip(length)
            return None
        if kind != _ARRAY or depth >= _MAX_NESTING:
            raise unusable(f"the GGUF metadata hold a value of the unknown type {kind}", _DAMAGED)
        inner, count = int(self.number("I")), self.count(MAX_ARRAY, "an array")
        self.arrays_left -= count
        if self.arrays_left < 0:
            raise unusable(f"the GGUF metadata hold more than {MAX_ARRAY} values in arrays", _DAMAGED)
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(self.order + _SCALARS[inner]))
            return None
        for _ in range(count):
            self.value(inner, depth + 1)
        return None


def read(file: BinaryIO, size: int) -> ModelProfile:
    """The profile of a GGUF file. Raises SpecError (MODEL_UNUSABLE)."""
    reader = _Reader(file, size)
    if reader.take(4) != MAGIC:
        raise unusable("not a GGUF file", _DAMAGED)
    version = int(reader.number("I"))
    if version and not version & 0xFFFF:
        reader.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
    if not 1 <= version <= 3:
        raise unusable(f"GGUF version {version} is not known", "convert the model with a current llama.cpp")
    reader.version = version
    tensor_count = reader.count(MAX_TENSORS, "a number of tensors")
    for _ in range(reader.count(MAX_KEYS, "a number of metadata keys")):
        key = reader.text(MAX_NAME_CHARACTERS)
        if key in reader.metadata:
            raise unusable(f"the GGUF metadata name {key[:80]!r} twice", _DAMAGED)
        value = reader.value(int(reader.number("I")))
        if value is not None:
            reader.metadata[key] = value
    tensors = [_tensor(reader) for _ in range(tensor_count)]
    if not tensors:
        raise unusable("the GGUF file holds no tensors", "a file of a vocabulary alone is no model")
    _check_places(reader, tensors)
    return describe(_description(reader.metadata, tensors, size, version))


def _tensor(reader: _Reader) -> _Tensor:
    name = reader.text(MAX_NAME_CHARACTERS)
    rank = int(reader.number("I"))
    if rank > 8:
        raise unusable(f"the GGUF tensor {name[:80]!r} has {rank} dimensions", _DAMAGED)
    shape = check_shape(name, [reader.count(1 << 47, "a dimension") for _ in range(rank)])
    kind, offset = int(reader.number("I")), int(reader.number("Q"))
    if kind not in TYPES:
        raise unusable(f"the GGUF tensor {name[:80]!r} has the unknown type {kind}", "a newer llama.cpp wrote the file")
    dtype, block, block_bytes = TYPES[kind]
    if shape and shape[0] % block:
        raise unusable(f"the GGUF tensor {name[:80]!r}: rows of {shape[0]} are no blocks of {dtype}", _DAMAGED)
    return _Tensor(name, dtype, shape, offset, math.prod(shape) // block * block_bytes)


def _check_places(reader: _Reader, tensors: list[_Tensor]) -> None:
    alignment = reader.metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise unusable(f"the GGUF file has the impossible alignment {str(alignment)[:40]}", _DAMAGED)
    start = -(-reader.at // alignment) * alignment
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise unusable("the GGUF file names a tensor twice", _DAMAGED)
    end = 0
    for tensor in sorted(tensors, key=lambda each: each.offset):
        if tensor.offset < end:
            raise unusable(f"the GGUF tensor {tensor.name[:80]!r} overlaps the one before it", _DAMAGED)
        end = tensor.offset + tensor.bytes
    if start + end > reader.size:
        raise unusable(f"the GGUF file lists {start + end} bytes, it has {reader.size}", _DAMAGED)


def _description(
    metadata: dict[str, int | float | bool | str], tensors: list[_Tensor], size: int, version: int
) -> Description:
    architecture = str(metadata.get("general.architecture", ""))[:80]
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    counts: dict[str, int] = {}
    for tensor in tensors:
        prefix, _, leaf = tensor.name.rpartition(".")
        groups.setdefault(prefix or tensor.name, {})[leaf] = tuple(reversed(tensor.shape))
        counted = 0 if (prefix or tensor.name) in _NO_PARAMETERS or _buffer(prefix) else math.prod(tensor.shape)
        counts[prefix or tensor.name] = counts.get(prefix or tensor.name, 0) + counted
    layers = [Layer(prefix, _kind(prefix, group), counts[prefix]) for prefix, group in groups.items() if counts[prefix]]
    parameters = sum(counts.values())
    said = metadata.get("general.parameter_count")
    notes = [f"GGUF version {version}, architecture {architecture or 'not said'}"]
    if isinstance(said, int) and said != parameters:
        notes.append(f"its metadata say {said} parameters, its tensors hold {parameters}")
    for key in ("general.name", f"{architecture}.context_length", f"{architecture}.block_count"):
        if key in metadata:
            notes.append(f"{key}: {str(metadata[key])[:120]}")
    shards = metadata.get("split.count", 1)
    is_shard = type(shards) is int and shards > 1
    if is_shard:
        number = metadata.get("split.no")
        which = f"shard {number + 1}" if type(number) is int else "a shard"
        notes.append(f"{which} of {shards}: the others are not counted, join them with llama-gguf-split")
    if "general.architecture" not in metadata:
        notes.append("its metadata do not name an architecture")
    return Description(
        framework="gguf",
        file_format="gguf",
        file_bytes=size,
        why_not=WHY_NOT,
        layers=layers,
        parameters=parameters,
        dtypes={tensor.dtype for tensor in tensors},
        family=_family(architecture, layers),
        task=_task(architecture, metadata, groups),
        unknown=["parameters"] if is_shard else [],
        notes=notes,
    )


def _buffer(prefix: str) -> bool:
    return prefix.rpartition(".")[2] in _NO_PARAMETERS


def _kind(prefix: str, tensors: dict[str, tuple[int, ...]]) -> str:
    last = prefix.rpartition(".")[2]
    weight = tensors.get("weight", ())
    if "embd" in last and len(weight) == 2:
        return "Embedding"
    if "norm" in last:
        return "LayerNorm" if "bias" in tensors else "RMSNorm"
    return "Linear" if len(weight) == 3 and last.endswith("_exps") else kind_of(prefix, tensors)


def _family(architecture: str, layers: list[Layer]) -> tuple[Family, float]:
    name = architecture.lower()
    if any(layer.name.rpartition(".")[2].startswith("attn") for layer in layers):
        return Family.TRANSFORMER, 1.0 if name else 0.9
    if name.startswith(_RECURRENT):
        return Family.RNN, 0.9
    if name.startswith(_CONVOLUTIONAL) or any(layer.kind.startswith("Conv") for layer in layers):
        return Family.CNN, 0.7
    return Family.UNKNOWN, 0.3


def _task(architecture: str, metadata: dict[str, int | float | bool | str], groups: Iterable[str]) -> str:
    if metadata.get("general.type", "model") != "model":
        return ""
    if architecture in _EMBEDS or metadata.get(f"{architecture}.pooling_type"):
        return "features"
    causal = metadata.get(f"{architecture}.attention.causal", True)
    return "language_model" if "token_embd" in groups and architecture and causal else ""
