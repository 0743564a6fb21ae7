"""Which part of a tensor somebody holds: a box inside its whole shape. Pure arithmetic.

A checkpoint written by one decomposition is read by another through these: each rank says which box of which tensor it
needs, and takes the overlaps from whoever has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Extent:
    """The box [start, start + size) of a tensor of `shape`, in each dimension."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Extent:
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def is_whole(self) -> bool:
        return self.size == self.shape

    @property
    def elements(self) -> int:
        return prod(self.size)

    def overlap(self, other: Extent) -> Extent | None:
        """The box that both hold, None when there is none. Raises ValueError for boxes of tensors of other shapes."""
        if self.shape != other.shape:
            raise ValueError(f"a tensor of shape {self.shape} is not one of shape {other.shape}")
        ends = zip(self.start, self.size, other.start, other.size, strict=True)
        pairs = [(max(a, b), min(a + n, b + m)) for a, n, b, m in ends]
        if any(stop <= start for start, stop in pairs):
            return None
        return Extent(self.shape, tuple(a for a, _ in pairs), tuple(b - a for a, b in pairs))

    def inside(self, outer: Extent) -> tuple[slice, ...]:
        """Where this box lies in a tensor that holds `outer`."""
        return tuple(
            slice(a - origin, a - origin + n) for a, origin, n in zip(self.start, outer.start, self.size, strict=True)
        )
