"""The header of a safetensors file, fully checked; not one byte of tensor data is read.

Layout: 8 bytes little-endian header length, JSON {name: {dtype, shape, data_offsets}, "__metadata__": {...}}, data.
Invariants checked: the header lies inside the file, names are unique, each tensor's range is exactly its shape times
its type, and the ranges cover the data without holes, overlaps or a rest.
"""

from __future__ import annotations

import json
from typing import Any, BinaryIO

from coordinator.identify.tensors import MAX_NAME_CHARACTERS, MAX_TENSORS, TensorInfo, check_shape, unusable

MAX_HEADER_BYTES = 16 * 1024 * 1024
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_AGAIN = "the file is damaged or was cut short: copy it again or write it again with safetensors.torch.save_file"


def looks_like(head: bytes, size: int) -> bool:
    """True for a header of any length where that is no text and JSON follows. Truncated files still match."""
    if len(head) < 9 or head[8:9] != b"{":
        return False
    if 2 <= int.from_bytes(head[:8], "little") < max(size * 1024, MAX_HEADER_BYTES):
        return True
    return head[8:10] == b'{"' and min(head[:8]) < ord("\t")


def read(file: BinaryIO, size: int) -> list[TensorInfo]:
    """The tensors a safetensors file lists. Raises SpecError naming what is wrong."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise unusable(f"the safetensors header of {length} bytes is over the limit of {MAX_HEADER_BYTES}", _AGAIN)
    if length > size - 8:
        raise unusable(f"the safetensors header of {length} bytes does not fit in a file of {size} bytes", _AGAIN)
    header = _json(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise unusable("the safetensors __metadata__ is not a mapping", _AGAIN)
    if len(header) > MAX_TENSORS:
        raise unusable(f"{len(header)} tensors are over the limit of {MAX_TENSORS}")
    ranges: list[tuple[int, int]] = []
    tensors = []
    for name, entry in header.items():
        tensor, begin = _tensor(name, entry)
        tensors.append(tensor)
        ranges.append((begin, begin + tensor.bytes))
    position = 0
    for begin, end in sorted(ranges):
        if begin != position:
            raise unusable(f"safetensors data overlap or leave a hole at byte {min(begin, position)}", _AGAIN)
        position = end
    if position != size - 8 - length:
        raise unusable(
            f"the safetensors header lists {position} bytes of data, the file has {size - 8 - length}", _AGAIN
        )
    return tensors


def _json(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise unusable("the safetensors header names something twice", _AGAIN)
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise unusable("the safetensors header is not valid JSON", _AGAIN) from None
    if not isinstance(header, dict):
        raise unusable("the safetensors header is not a mapping", _AGAIN)
    return header


def _tensor(name: str, entry: Any) -> tuple[TensorInfo, int]:
    if len(name) > MAX_NAME_CHARACTERS:
        raise unusable(f"a tensor name of {len(name)} characters is over the limit of {MAX_NAME_CHARACTERS}", _AGAIN)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise unusable(f"tensor {name[:80]!r}: expected dtype, shape and data_offsets", _AGAIN)
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise unusable(f"tensor {name[:80]!r} has an unknown type {str(dtype)[:40]!r}", _AGAIN)
    if not isinstance(entry["shape"], list):
        raise unusable(f"tensor {name[:80]!r} has an impossible shape", _AGAIN)
    shape = check_shape(name, entry["shape"])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int and at >= 0 for at in offsets):
        raise unusable(f"tensor {name[:80]!r} has impossible offsets", _AGAIN)
    tensor = TensorInfo(name, dtype, shape, offsets[1] - offsets[0])
    if tensor.bytes < 0 or tensor.elements * BITS[dtype] != tensor.bytes * 8:
        raise unusable(f"tensor {name[:80]!r}: {tensor.bytes} bytes do not hold {dtype}{list(shape)}"[:200], _AGAIN)
    return tensor, offsets[0]
