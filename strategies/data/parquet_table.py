"""A parquet file: numeric columns, lists of numbers of one length, and text labels; one row group is one chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from strategies.data.chunks import Chunk
from strategies.data.dataset import WINDOW_BLOCKS, Array
from strategies.data.rows import Fields
from strategies.data.source import unknown_name, unusable
from strategies.data.target import TargetScan


class ParquetFile:
    window_blocks = WINDOW_BLOCKS

    def __init__(self, path: Path, where: str, fields: Fields) -> None:
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ImportError:
            raise unusable(
                f"{where}: parquet needs pyarrow on the node", "install pyarrow there, or use csv or npz"
            ) from None
        self.path = path
        self._where = where
        self._errors = (arrow.ArrowException, OSError, ValueError)
        try:
            self._file = parquet.ParquetFile(path, memory_map=True)
            schema = self._file.schema_arrow
        except self._errors as error:
            raise unusable(f"{where}: not a readable parquet file: {error}", "write it again") from None
        self.fields = self._resolve(fields, tuple(schema.names))
        assert isinstance(self.fields.features, tuple)
        self._features = self.fields.features
        metadata = self._file.metadata
        counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        if min(counts, default=0) < 0:
            raise unusable(f"{where}: not a readable parquet file: a row group of {min(counts)} rows", "write it again")
        self.starts = np.cumsum([0, *counts], dtype=np.int64)
        lists = [name for name in self._features if _is_list(schema.field(name).type)]
        for name in self._features:
            self._check_type(name, schema.field(name).type)
        alone = bool(lists) and len(self._features) == 1
        whole = alone and arrow.types.is_integer(schema.field(lists[0]).type.value_type)
        self.feature_dtype = "int64" if whole else "float32"
        self.feature_shape = (self._width(lists),)
        self.target = self._scan()

    def _resolve(self, fields: Fields, names: tuple[str, ...]) -> Fields:
        wanted = (fields.features,) if isinstance(fields.features, str) else fields.features
        for name in (*(wanted or ()), *((fields.target,) if fields.target is not None else ())):
            if name not in names:
                raise unknown_name(self._where, "column", name, names)
        wanted = tuple(name for name in names if name != fields.target) if wanted is None else wanted
        if not wanted:
            raise unusable(f"{self._where}: no column is left for the features", "set data.features")
        return Fields(wanted, fields.target)

    def _check_type(self, name: str, kind: Any) -> None:
        inner = kind.value_type if _is_list(kind) else kind
        if not _is_number(inner):
            raise unusable(
                f"{self._where}: column {name!r} holds {kind}, not numbers", "list the numeric columns in data.features"
            )

    def _width(self, lists: list[str]) -> int:
        """Values of one row: a list column counts as long as its first row; `_values` checks the others."""
        self._lengths = dict.fromkeys(lists, 0)
        for number in range(len(self.starts) - 1):
            if lists and self.starts[number + 1] > self.starts[number]:
                with self._guarded(number):
                    table = self._read(number, lists)
                    for name in lists:
                        first = table.column(name)[0].as_py()
                        self._lengths[name] = len(first) if first is not None else 0
                break
        return len(self._features) - len(lists) + sum(self._lengths.values())

    def _scan(self) -> Any:
        if self.fields.target is None:
            return None
        scan = TargetScan(self._where, self.fields.target)
        for number in range(len(self.starts) - 1):
            if self.starts[number + 1] > self.starts[number]:
                with self._guarded(number):
                    scan.add(self._target(self._read(number, [self.fields.target]), number), int(self.starts[number]))
        return scan.summary()

    @contextmanager
    def _guarded(self, number: int) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise unusable(
                f"{self._where}: row group {number} cannot be read: {error}", "write the file again"
            ) from None

    def _read(self, number: int, columns: list[str]) -> Any:
        table = self._file.read_row_group(number, columns=columns)
        if table.num_rows != self.starts[number + 1] - self.starts[number]:
            raise ValueError(f"it holds {table.num_rows} rows, which is not what the file says")
        return table

    def read(self, chunk: int) -> Chunk:
        wanted = dict.fromkeys([*self._features, *([self.fields.target] if self.fields.target is not None else [])])
        with self._guarded(chunk):
            table = self._read(chunk, list(wanted))
            parts = [self._values(table, name, chunk) for name in self._features]
            features = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            return features, None if self.fields.target is None else self._target(table, chunk)

    def _values(self, table: Any, name: str, chunk: int) -> Array:
        """[rows, k] of one feature column; a missing number is NaN."""
        column = table.column(name).combine_chunks()
        with np.errstate(over="ignore"):
            if name not in self._lengths:
                return _numbers(column).astype(np.float32).reshape(-1, 1)
            length = self._lengths[name]
            sizes = np.asarray([len(value) if value.is_valid else -1 for value in column])
            if (sizes != length).any():
                row = int(self.starts[chunk]) + int(np.flatnonzero(sizes != length)[0]) + 1
                raise unusable(
                    f"{self._where}: row {row}: {name!r} has another number of values than row 1, which has {length}",
                    "every row must have the same number of values",
                )
            values = column.flatten()
            if values.null_count and self.feature_dtype == "int64":
                raise unusable(f"{self._where}: {name!r} has lists with missing numbers", "fill them in")
            return _numbers(values).astype(self.feature_dtype).reshape(len(column), length)

    def _target(self, table: Any, chunk: int) -> Array:
        import pyarrow as arrow

        name = self.fields.target
        column = table.column(name).combine_chunks()
        if column.null_count:
            missing = next(row for row, value in enumerate(column) if not value.is_valid)
            raise unusable(
                f"{self._where}: row {int(self.starts[chunk]) + missing + 1}: {name!r} is empty",
                "every row needs a target: fill it in or remove the row",
            )
        kind = column.type
        if arrow.types.is_dictionary(kind):
            column = column.dictionary_decode()
            kind = column.type
        if arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
            cells = np.empty(len(column), dtype=object)
            cells[:] = column.to_pylist()
            return cells
        self._check_type(name or "", kind)
        if _is_list(kind):
            values = _numbers(column.flatten())
            if len(column) and (len(values) % len(column) or len({len(value) for value in column}) != 1):
                raise unusable(f"{self._where}: {name!r} has lists of different lengths", "make them equally long")
            return values.reshape(len(column), -1)
        return _numbers(column)


def _is_list(kind: Any) -> bool:
    import pyarrow as arrow

    types = arrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_number(kind: Any) -> bool:
    import pyarrow as arrow

    types = arrow.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind))


def _numbers(column: Any) -> Array:
    import pyarrow as arrow

    if arrow.types.is_decimal(column.type):
        column = column.cast(arrow.float64())
    values: Array = column.to_numpy(zero_copy_only=False)
    # booleans with missing values come as objects
    return values.astype(np.float64) if values.dtype == object else values
