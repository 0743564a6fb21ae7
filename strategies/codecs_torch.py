"""What a gradient bucket looks like on the wire.

A codec turns a flat fp32 bucket into what is summed by the all-reduce, and back. The sum is taken in the wire's dtype,
so a codec must be linear: each rank's part is already weighted by its share of the batch, so sums stay in range.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from protos.errors import ErrorCode, SpecError


class Codec(Protocol):
    def encode(self, bucket: Tensor) -> Tensor:
        """What to sum; may be the bucket itself."""

    def decode(self, wire: Tensor, bucket: Tensor) -> None:
        """Writes the summed wire into the bucket."""


class Plain:
    def encode(self, bucket: Tensor) -> Tensor:
        return bucket

    def decode(self, wire: Tensor, bucket: Tensor) -> None:
        if wire is not bucket:
            bucket.copy_(wire)


class HalfPrecision:
    """fp16: half the bytes; relative error about 4e-4, values below 6e-8 vanish, over 65504 are infinite."""

    def encode(self, bucket: Tensor) -> Tensor:
        return bucket.half()

    def decode(self, wire: Tensor, bucket: Tensor) -> None:
        bucket.copy_(wire)


def codec(name: str) -> Codec:
    match name:
        case "none" | "auto":
            return Plain()
        case "fp16":
            return HalfPrecision()
    raise SpecError(f"compression {name!r} is not built", "use none or fp16", code=ErrorCode.UNSUPPORTED)
