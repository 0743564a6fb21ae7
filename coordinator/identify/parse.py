"""A model file's bytes to a ModelProfile: magic bytes decide, never the suffix; nothing is executed.

Owns the order of recognition and the names of formats that are known only by their first bytes. Meant to run in the
confined child (child.py); in-process it is safe from code, not from a file made to exhaust memory.
"""

from __future__ import annotations

import ast
import json
import warnings
from dataclasses import replace
from typing import BinaryIO

from coordinator.identify import pytorch_file, safetensors_header
from coordinator.identify.tensors import MAX_NAME_CHARACTERS, WHAT_HIVE_TRAINS, foreign, profile_of, unusable
from protos.model import ModelProfile
from strategies.hugging_face import check_config

HEAD_BYTES = 4096
MAX_SOURCE_BYTES = 1024 * 1024

WEIGHT_FORMATS = frozenset({"safetensors", "pytorch_state_dict", "pytorch_legacy", "pytorch_checkpoint"})
PYTHON_SOURCE = "python_source"
HUGGING_FACE = "hugging_face"

_MAGIC: tuple[tuple[bytes, int, str, str, str], ...] = (
    (b"GGUF", 0, "gguf", "gguf", "GGUF is for inference, usually quantised: start from the original safetensors"),
    (b"\x89HDF\r\n\x1a\n", 0, "keras", "hdf5", "HDF5 (Keras .h5) is not read: rebuild the model in PyTorch"),
    (b"\x93NUMPY", 0, "numpy", "npy", "an npy file holds one array, not a model"),
    (b"TFL3", 4, "tensorflow", "tflite", "TFLite is for inference: rebuild the model in PyTorch"),
    (b"\x1f\x8b", 0, "unknown", "gzip", "a compressed file: unpack it first"),
    (b"\x28\xb5\x2f\xfd", 0, "unknown", "zstd", "a compressed file: unpack it first"),
    (b"BZh", 0, "unknown", "bzip2", "a compressed file: unpack it first"),
    (b"\xfd7zXZ\x00", 0, "unknown", "xz", "a compressed file: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", 0, "unknown", "7z", "a compressed file: unpack it first"),
    (b"ustar", 257, "unknown", "tar", "an archive: unpack it first"),
)


def identify(file: BinaryIO) -> ModelProfile:
    """The profile of a seekable file. Raises SpecError (MODEL_UNUSABLE) for empty, damaged, hostile or unknown ones."""
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if not head:
        raise unusable("the model file is empty", "was it written completely? Copy it again")
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return pytorch_file.identify_zip(file, size)
    if head.startswith(pytorch_file.LEGACY_HEAD):
        return pytorch_file.identify_legacy(file, size)
    if safetensors_header.looks_like(head, size):
        return profile_of(
            safetensors_header.read(file, size),
            framework="safetensors",
            file_format="safetensors",
            file_bytes=size,
            why_not=pytorch_file.WEIGHTS_ONLY,
        )
    for magic, offset, framework, file_format, advice in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return foreign(framework, file_format, size, f"{advice}. {WHAT_HIVE_TRAINS}")
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return pytorch_file.identify_pickle(file, size)
    if _onnx(head):
        advice = "ONNX is for inference: give the PyTorch source it was exported from"
        return foreign("onnx", "onnx", size, f"{advice}. {WHAT_HIVE_TRAINS}")
    return _text(file, size)


def _configuration(source: str, size: int) -> ModelProfile:
    """The config.json of a Hugging Face directory; what else it says is found out on a node, by building it."""
    try:
        content = json.loads(source)
    except (ValueError, RecursionError):
        raise unusable("the text starts like JSON and is none") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise unusable("a JSON file describes a model but is not one")
    check_config(content)
    why_not = "name the directory that it lies in: model: {source: DIRECTORY}; it is identified on a node"
    profile = foreign("pytorch", HUGGING_FACE, size, why_not, architecture=content["model_type"][:MAX_NAME_CHARACTERS])
    return replace(profile, trainable=True)


def _onnx(head: bytes) -> bool:
    """An ONNX ModelProto starts with ir_version (field 1, a small number), then the producer, a domain or the graph."""
    return len(head) > 3 and head[0] == 0x08 and 0 < head[1] < 32 and head[2] in (0x12, 0x1A, 0x22, 0x2A, 0x3A, 0x42)


def _text(file: BinaryIO, size: int) -> ModelProfile:
    unknown = unusable("not a model file hive knows: its first bytes match no format")
    if size > MAX_SOURCE_BYTES:
        raise unknown
    file.seek(0)
    try:
        source = file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise unknown from None
    if "\0" in source:
        raise unknown
    if source.lstrip().startswith("{"):
        return _configuration(source, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the user's escapes and comparisons
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise unusable("the text is neither Python source nor a model file") from None
    functions = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    profile = foreign("pytorch", PYTHON_SOURCE, size, "")
    if not functions:
        return replace(profile, why_not=f"the Python file defines no function or class. {WHAT_HIVE_TRAINS}")
    why_not = f"name the function that builds the model, e.g. FILE.py:{functions[0]}; it is identified on a node"
    return replace(profile, trainable=True, why_not=why_not)
