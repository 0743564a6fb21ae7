"""What the walk of a pickle answers with: plain values, and records of what it did not build.

`None`, bool, int, float, str, bytes, list (also for sets) and tuple stand for themselves. Everything else is one of the
records here. A walked value may share parts and hold cycles (a pickle's memo): whoever goes through one keeps count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from coordinator.identify.tensors import TensorInfo, check_shape, unusable

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8,
    "C128": 16, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
_DAMAGED = "the file is damaged: write it again with torch.save(model.state_dict(), PATH)"


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by its name. It was not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".encode("ascii", "replace").decode()


@dataclass(slots=True)
class Mapping:
    """A dict or OrderedDict. Keys are kept only when they are text or integers."""

    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Object:
    """What calling `type` with `arguments` would have made; nothing was called.

    `state` is what it would have been given afterwards, `elements` and `items` what would have been put into it.
    `attributes` reads the state as the usual dict.
    """

    type: Global
    arguments: tuple[Any, ...] = ()
    state: Any = None
    elements: list[Any] | None = None
    items: Mapping | None = None

    @property
    def attributes(self) -> dict[Any, Any]:
        """Its `__dict__` and slots, as far as the state is of that form; empty otherwise."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        mappings = [part.items for part in parts if isinstance(part, Mapping)]
        if len(mappings) == 1:
            return mappings[0]
        return {name: value for items in mappings for name, value in items.items()}


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes or text that were stepped over, because they are long: how many there are (characters of a text)."""

    length: int


@dataclass(slots=True, eq=False)
class DType:
    """A numpy type: `code` as numpy writes it ("f8", "V64"), `fields` of a record."""

    code: str
    item_bytes: int
    fields: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """safetensors' name of it, or numpy's code where there is none."""
        kind = {"f": "F", "i": "I", "u": "U", "c": "C"}.get(self.code[:1])
        if self.code == "b1":
            return "BOOL"
        return f"{kind}{self.item_bytes * 8}" if kind else self.code

    @property
    def holds_objects(self) -> bool:
        return self.code.startswith("O")


@dataclass(slots=True, eq=False)
class Array:
    """A numpy array: what it claims was compared with the bytes that are there."""

    shape: tuple[int, ...] = ()
    dtype: DType | None = None
    objects: list[Any] | None = None  # the elements, when they are Python objects

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.item_bytes if self.dtype is not None else 0


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of numbers kept elsewhere in the file: `dtype` is what its typed storage says."""

    dtype: str
    key: str
    elements: int

    @property
    def bytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Tensor:
    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    learned: bool = False  # it was saved as a Parameter

    def info(self, name: str) -> TensorInfo:
        """As a named tensor; raises SpecError when it reaches beyond its storage or claims more than is stored."""
        shape = check_shape(name, self.shape)
        item, stored = ITEM_BYTES[self.dtype], self.storage.bytes
        count = math.prod(shape)
        reach = self.offset + 1 + sum((size - 1) * step for size, step in zip(shape, self.stride, strict=True))
        if count and (reach * item > stored or count * item > stored):
            raise unusable(f"tensor {name[:80]!r} claims more than the {stored} bytes stored for it", _DAMAGED)
        identity = (self.storage.key, self.offset, shape, self.stride)
        return TensorInfo(name, self.dtype, shape, count * item, identity)
