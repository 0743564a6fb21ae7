"""Formats that are known by their first bytes alone, and what is said of a file that nobody knows."""

from __future__ import annotations

from dataclasses import replace
from typing import BinaryIO

from coordinator.identify.tensors import WHAT_HIVE_TRAINS, foreign
from protos.model import ModelProfile

_SHOWN_BYTES = 16
_MAGIC: tuple[tuple[bytes, int, str, str, str], ...] = (
    (b"TFL3", 4, "tensorflow", "tflite", "TFLite is for inference: rebuild the model in PyTorch"),
    (b"\x1f\x8b", 0, "unknown", "gzip", "a compressed file: unpack it first"),
    (b"\x28\xb5\x2f\xfd", 0, "unknown", "zstd", "a compressed file: unpack it first"),
    (b"BZh", 0, "unknown", "bzip2", "a compressed file: unpack it first"),
    (b"\xfd7zXZ\x00", 0, "unknown", "xz", "a compressed file: unpack it first"),
    (b"\x04\x22\x4d\x18", 0, "unknown", "lz4", "a compressed file: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", 0, "unknown", "7z", "a compressed file: unpack it first"),
    (b"ustar", 257, "unknown", "tar", "an archive: unpack it first"),
)


def looks_known(head: bytes, size: int) -> bool:
    return any(head[offset : offset + len(magic)] == magic for magic, offset, *_ in _MAGIC)


def read(file: BinaryIO, size: int) -> ModelProfile:
    """A format that is named, and what to do instead."""
    file.seek(0)
    head = file.read(512)
    for magic, offset, framework, file_format, advice in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return foreign(framework, file_format, size, f"{advice}. {WHAT_HIVE_TRAINS}")
    return unknown(head, size)


def unknown(head: bytes, size: int) -> ModelProfile:
    """A file that no reader knows, with what was seen of it."""
    why_not = f"not a model file hive knows: its first bytes match no format. {WHAT_HIVE_TRAINS}"
    return replace(foreign("unknown", "unknown", size, why_not, notes=(_seen(head, size),)), confidence=0.0)


def _seen(head: bytes, size: int) -> str:
    first = head[:_SHOWN_BYTES]
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in first)
    return f"{size} bytes, which start with {first.hex(' ')} ({text})"
