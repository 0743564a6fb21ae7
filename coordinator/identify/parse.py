"""A model file's bytes to a ModelProfile: magic bytes decide, never the suffix; nothing is executed.

Owns the order of recognition, nothing of a format. To add a format: a module of its own with `read(file, size)`, and a
line in READERS here (files), in archive_readers.READERS (zip archives, known by the names of their entries) or in
folder_readers.READERS (directories). A reader raises SpecError through `tensors.unusable` and nothing else; it reads
what it is handed and opens nothing; it imports at the top of its module only, because after the start no file can be
opened; and it bounds what it takes before it takes it. tests/fuzz knows every reader by its name. Meant to run in the
confined child (child.py); in-process it is safe from code, not from a file made to exhaust memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from coordinator.identify import (
    archive_readers,
    first_bytes,
    gguf_file,
    hdf5_file,
    joblib_stream,
    keras_file,
    numpy_file,
    onnx_file,
    pickle_file,
    pytorch_file,
    safetensors_header,
    text_file,
)
from coordinator.identify.tensors import complexity_told, profile_of, unusable
from protos.model import ModelProfile

HEAD_BYTES = 4096
WEIGHT_FORMATS = frozenset({"safetensors", "pytorch_state_dict", "pytorch_legacy", "pytorch_checkpoint"})


@dataclass(frozen=True, slots=True)
class Reader:
    """`matches` is shown the first HEAD_BYTES and the size of the file, `read` the file at any position."""

    name: str
    matches: Callable[[bytes, int], bool]
    read: Callable[[BinaryIO, int], ModelProfile]


def _text(file: BinaryIO, size: int) -> ModelProfile:
    joblib_stream.refuse_harmful(file)  # a pickle before protocol 2 may be text, and has no beginning of its own
    return text_file.read(file, size)


def starts_with(*magic: bytes) -> Callable[[bytes, int], bool]:
    return lambda head, size: head.startswith(magic)


def _safetensors(file: BinaryIO, size: int) -> ModelProfile:
    return profile_of(
        safetensors_header.read(file, size),
        framework="safetensors",
        file_format="safetensors",
        file_bytes=size,
        why_not=pytorch_file.WEIGHTS_ONLY,
    )


READERS: tuple[Reader, ...] = (  # the first that matches reads
    Reader("zip", starts_with(b"PK\x03\x04", b"PK\x05\x06"), archive_readers.read),
    Reader("pytorch_legacy", starts_with(pytorch_file.LEGACY_HEAD), pytorch_file.identify_legacy),
    Reader("safetensors", safetensors_header.looks_like, _safetensors),
    Reader("gguf", starts_with(gguf_file.MAGIC), gguf_file.read),
    Reader("npy", starts_with(numpy_file.MAGIC), numpy_file.read_npy),
    Reader("onnx", onnx_file.looks_like, onnx_file.read),
    Reader("hdf5", starts_with(hdf5_file.MAGIC), keras_file.read_hdf5),
    Reader("joblib", joblib_stream.looks_like, joblib_stream.read),  # the compressed ones; others are pickles
    Reader("first_bytes", first_bytes.looks_known, first_bytes.read),  # formats that are named and not read
    Reader("pickle", pickle_file.looks_like, pickle_file.read),
    Reader("text", text_file.looks_like, _text),
)


def identify(file: BinaryIO) -> ModelProfile:
    """The profile of a seekable file; of format "unknown" when no reader knows it. Raises SpecError (MODEL_UNUSABLE)
    for empty, damaged and hostile ones."""
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if not head:
        raise unusable("the model file is empty", "was it written completely? Copy it again")
    for reader in READERS:
        if reader.matches(head, size):
            return complexity_told(reader.read(file, size))
    joblib_stream.refuse_harmful(file)
    return complexity_told(first_bytes.unknown(head, size))
