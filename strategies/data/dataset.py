"""The seam between data and a training loop: `Dataset` gives batches of rows by index.

Owns the bounds that decide what is kept in memory and how large the blocks of the sample order are. These are
constants, never properties of a machine, because the sample order depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from strategies.sample_order import EpochOrder

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Features = Array | dict[str, Array]
Shape = tuple[int, ...]

IN_MEMORY_BYTES = 256 * 1024 * 1024  # decoded once and kept when both the file and its rows are below
BLOCK_BYTES = 2 * 1024 * 1024
BLOCK_ROWS_LIMIT = 65_536
WINDOW_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """`features`: [n, ...] or a dict of such arrays by name; `target`: int64 labels, or float32 with shape [n, k]."""

    features: Features
    target: Array | None


class Dataset(Protocol):
    """Rows of one split. Shapes and dtypes are of one row, without the batch dimension.

    Features are float32, or int64 for whole numbers of more than a byte (token ids). A scalar target is int64 [n] when
    it holds labels and float32 [n, 1] otherwise, so that a model ending in Linear(.., 1) meets it without broadcasting.
    One thread at a time may call `batch`.
    """

    @property
    def digest(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def feature_shapes(self) -> Shape | Mapping[str, Shape]: ...
    @property
    def feature_dtypes(self) -> str | Mapping[str, str]: ...
    @property
    def target_shape(self) -> Shape | None: ...
    @property
    def target_dtype(self) -> str | None: ...
    @property
    def classes(self) -> int | None:
        """Outputs a classifier needs when the target is labels: the largest label + 1; 256 for text."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the labels were called, by number, when the target was text."""

    @property
    def block_rows(self) -> int: ...
    @property
    def window_blocks(self) -> int: ...

    def batch(self, indices: Indices) -> Batch:
        """The rows of `indices`, in that order. Raises SpecError naming file, row and column of a bad value."""


def epoch_order(dataset: Dataset, seed: int, epoch: int, shuffle: bool, digest: str | None = None) -> EpochOrder:
    """The order of an epoch of this dataset; every rank must use the same `digest` (that of rank 0)."""
    return EpochOrder(
        digest or dataset.digest, seed, epoch, dataset.rows, shuffle, dataset.block_rows, dataset.window_blocks
    )


def block_rows_for(row_bytes: int) -> int:
    """Rows of one block of about BLOCK_BYTES."""
    return max(1, min(BLOCK_ROWS_LIMIT, BLOCK_BYTES // max(1, row_bytes)))
