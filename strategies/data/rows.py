"""Raw rows of any source, and the datasets made of them.

A source only has to give `Rows`: features ready for a model and targets as they were written. Coding targets, keeping
small sources in memory, joining shards and cutting splits are done here, once for all sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from strategies.data.dataset import IN_MEMORY_BYTES, Array, Batch, Dataset, Features, Indices, Shape
from strategies.data.source import unusable
from strategies.data.target import TargetCoding, TargetSummary


@dataclass(frozen=True, slots=True)
class Fields:
    """Which columns or arrays to use. After a source is opened: the ones that were used, by name."""

    features: str | tuple[str, ...] | None
    target: str | None
    sequence_length: int | None = None


class Rows(Protocol):
    """`target` None: there is none. `resident`: everything already lies in memory as `gather` returns it."""

    @property
    def rows(self) -> int: ...
    @property
    def fields(self) -> Fields: ...
    @property
    def feature_shapes(self) -> Shape | Mapping[str, Shape]: ...
    @property
    def feature_dtypes(self) -> str | Mapping[str, str]: ...
    @property
    def target(self) -> TargetSummary | None: ...
    @property
    def block_rows(self) -> int: ...
    @property
    def window_blocks(self) -> int: ...
    @property
    def keep(self) -> bool:
        """Whether to decode everything once and keep it, if it fits."""

    def gather(self, indices: Indices) -> tuple[Features, Array | None]: ...


class CodedDataset:
    """Rows with their targets coded: the Dataset of every source."""

    def __init__(self, rows: Rows, coding: TargetCoding | None, digest: str) -> None:
        self._source = rows
        self._coding = coding
        self.digest = digest
        self.rows = rows.rows
        self.feature_shapes = rows.feature_shapes
        self.feature_dtypes = rows.feature_dtypes
        self.target_shape = coding.shape if coding else None
        self.target_dtype = coding.dtype if coding else None
        self.classes = coding.classes if coding else None
        self.class_names = coding.class_names if coding else ()
        self.block_rows = rows.block_rows
        self.window_blocks = rows.window_blocks

    def batch(self, indices: Indices) -> Batch:
        features, raw = self._source.gather(indices)
        if self._coding is None or raw is None:
            return Batch(features, raw)
        return Batch(features, self._coding.encode(raw, indices))


class KeptDataset(CodedDataset):
    """The same, decoded once: `batch` is one gather per array."""

    def __init__(self, rows: Rows, coding: TargetCoding | None, digest: str) -> None:
        super().__init__(rows, coding, digest)
        self._features, self._target = self._read_all()
        del self._source  # and whatever it has cached

    def _read_all(self) -> tuple[Features, Array | None]:
        parts = [
            super(KeptDataset, self).batch(np.arange(start, min(start + self.block_rows, self.rows), dtype=np.int64))
            for start in range(0, self.rows, self.block_rows)
        ]
        targets = [part.target for part in parts if part.target is not None]
        target = np.concatenate(targets) if targets else None
        if isinstance(parts[0].features, dict):
            named: dict[str, list[Array]] = {name: [] for name in parts[0].features}
            for part in parts:
                assert isinstance(part.features, dict)
                for name, array in part.features.items():
                    named[name].append(array)
            return {name: np.concatenate(arrays) for name, arrays in named.items()}, target
        return np.concatenate([part.features for part in parts if not isinstance(part.features, dict)]), target

    def batch(self, indices: Indices) -> Batch:
        features = self._features
        target = None if self._target is None else self._target.take(indices, axis=0)
        if isinstance(features, dict):
            return Batch({name: array.take(indices, axis=0) for name, array in features.items()}, target)
        return Batch(features.take(indices, axis=0), target)


class RowRange:
    """Rows [start, stop) of other rows: a split."""

    def __init__(self, rows: Rows, start: int, stop: int) -> None:
        self._inner = rows
        self._start = start
        self.rows = stop - start
        self.fields = rows.fields
        self.feature_shapes = rows.feature_shapes
        self.feature_dtypes = rows.feature_dtypes
        self.target = rows.target
        self.block_rows = rows.block_rows
        self.window_blocks = rows.window_blocks
        self.keep = rows.keep

    def gather(self, indices: Indices) -> tuple[Features, Array | None]:
        return self._inner.gather(indices + self._start)


class ConcatenatedRows:
    """Shards one after the other, in the order given."""

    def __init__(self, shards: Sequence[Rows], names: Sequence[str]) -> None:
        first = shards[0]
        summary = first.target
        for shard, name in zip(shards[1:], names[1:], strict=True):
            mine = (shard.feature_shapes, shard.feature_dtypes, shard.target.shape if shard.target else None)
            if mine != (first.feature_shapes, first.feature_dtypes, summary.shape if summary else None):
                raise unusable(
                    f"{name}: rows have other shapes or types than in {names[0]}",
                    "all shards must hold the same columns",
                )
            if summary is not None and shard.target is not None:
                summary = summary.merged(shard.target)
        self._shards = tuple(shards)
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self.rows = int(self._starts[-1])
        self.fields = first.fields
        self.feature_shapes = first.feature_shapes
        self.feature_dtypes = first.feature_dtypes
        self.target = summary
        self.block_rows = max(shard.block_rows for shard in shards)
        self.window_blocks = min(shard.window_blocks for shard in shards)
        self.keep = first.keep

    def gather(self, indices: Indices) -> tuple[Features, Array | None]:
        which = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.argsort(which, kind="stable")
        parts: list[tuple[Features, Array | None]] = []
        for shard in np.unique(which):
            own = indices[order[which[order] == shard]] - self._starts[shard]
            parts.append(self._shards[shard].gather(own))
        back = np.empty(len(indices), dtype=np.int64)
        back[order] = np.arange(len(indices))
        first = parts[0][0]
        features: Features
        if isinstance(first, dict):
            features = {
                name: np.concatenate([part[name] for part, _ in parts if isinstance(part, dict)])[back]
                for name in first
            }
        else:
            features = np.concatenate([part for part, _ in parts if not isinstance(part, dict)])[back]
        targets = [target for _, target in parts if target is not None]
        return features, np.concatenate(targets)[back] if targets else None


def dataset_of(rows: Rows, coding: TargetCoding | None, digest: str) -> Dataset:
    """Kept in memory when it is small and its rows never change, else read on demand."""
    if rows.keep and rows.rows * row_bytes(rows) <= IN_MEMORY_BYTES:
        return KeptDataset(rows, coding, digest)
    return CodedDataset(rows, coding, digest)


def row_bytes(rows: Rows) -> int:
    """Bytes of one row as `batch` returns it."""
    shapes, dtypes = rows.feature_shapes, rows.feature_dtypes
    if isinstance(shapes, Mapping) and isinstance(dtypes, Mapping):
        total = sum(_bytes(shapes[name], dtypes[name]) for name in shapes)
    else:
        assert isinstance(shapes, tuple) and isinstance(dtypes, str)
        total = _bytes(shapes, dtypes)
    return total + (_bytes(rows.target.shape, "int64") if rows.target else 0)


def _bytes(shape: Shape, dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
