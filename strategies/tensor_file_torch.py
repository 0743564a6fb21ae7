"""A safetensors file written from front to back, tensor by tensor, so that it never lies in memory whole.

Owns the header (an 8-byte length, JSON of names, types, shapes and offsets); values follow in the order of the entries.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from protos.errors import ErrorCode, SpecError
from strategies.checkpoint_torch import sync_folder

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


@contextmanager
def written(path: Path, entries: Mapping[str, Entry]) -> Iterator[Callable[[Tensor], None]]:
    """Gives a function that appends the next tensor, or the next piece of one. The file is fsynced at the end.

    Raises OSError of a full disk, SpecError for a type that the format does not have, and ValueError when fewer or more
    bytes were given than the entries say.
    """
    expected = sum(entry.bytes for entry in entries.values())
    given = 0
    with path.open("wb") as file:
        file.write(_header(entries))

        def put(tensor: Tensor) -> None:
            nonlocal given
            if tensor.numel():
                content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                given += file.write(content.data)

        yield put
        if given != expected:
            raise ValueError(f"{given} bytes of tensors were written, the header says {expected}")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def _header(entries: Mapping[str, Entry]) -> bytes:
    described: dict[str, object] = {}
    offset = 0
    for name, entry in entries.items():
        if entry.dtype not in _TYPES:
            raise SpecError(
                f"{name} is {entry.dtype}, which the model's file cannot hold",
                "use a common dtype for parameters and buffers",
                code=ErrorCode.MODEL_UNUSABLE,
            )
        described[name] = {
            "dtype": _TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
