"""A jsonl file: one JSON object per line, with numbers or (nested) lists of numbers in named fields.

Several feature fields give one float32 vector, in the order named; a single one keeps its shape, and stays int64 when
it is a list of whole numbers throughout (token ids). One streaming pass at opening checks every row; empty lines are
not rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from strategies.data.chunks import TEXT_BLOCK_BYTES, TEXT_WINDOW_BLOCKS, Chunk, chunk_rows_for
from strategies.data.csv_table import MAX_LINE_BYTES
from strategies.data.dataset import Array, Shape
from strategies.data.rows import Fields
from strategies.data.source import unknown_name, unusable
from strategies.data.target import Cells, TargetScan

_Record = dict[str, Any]


class JsonlFile:
    window_blocks = TEXT_WINDOW_BLOCKS

    def __init__(self, path: Path, where: str, fields: Fields, block_bytes: int = TEXT_BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self.path = path
        self._where = where
        self._cells = Cells()
        with path.open("rb") as file:
            first = next(self._records(file, 0), None)
            if first is None:
                raise unusable(f"{where}: the file is empty", "each line is one JSON object")
            self.fields = self._resolve(fields, tuple(first[0]))
            assert isinstance(self.fields.features, tuple)
            self._features = self.fields.features
            self._shapes: dict[str, Shape] = {
                name: self._array(first[0][name], name, 1).shape for name in self._features
            }
            self._whole = True
            scan = None if self.fields.target is None else TargetScan(where, self.fields.target)
            file.seek(0)
            self._offsets, starts = self._index(file, scan)
        self.starts = np.asarray(starts, dtype=np.int64)
        self.target = scan.summary() if scan else None
        only = self._shapes[self._features[0]]
        if len(self._features) == 1 and only:
            self.feature_shape = only
        else:
            self.feature_shape = (sum(int(np.prod(shape, dtype=np.int64)) for shape in self._shapes.values()),)
        self.feature_dtype = "int64" if self._whole and len(self._features) == 1 and only else "float32"

    def _resolve(self, fields: Fields, names: tuple[str, ...]) -> Fields:
        wanted = (fields.features,) if isinstance(fields.features, str) else fields.features
        for name in (*(wanted or ()), *((fields.target,) if fields.target is not None else ())):
            if name not in names:
                raise unknown_name(f"{self._where}: row 1", "field", name, names)
        wanted = tuple(name for name in names if name != fields.target) if wanted is None else wanted
        if not wanted:
            raise unusable(f"{self._where}: no field is left for the features", "set data.features")
        return Fields(wanted, fields.target)

    def _records(self, file: BinaryIO, first_row: int) -> Iterator[tuple[_Record, int]]:
        """Each record with the byte offset after it, from where the file stands."""
        row, end = first_row, file.tell()
        while line := file.readline(MAX_LINE_BYTES):
            end += len(line)
            if not line.strip():
                continue
            row += 1
            if len(line) == MAX_LINE_BYTES:
                raise unusable(f"{self._where}: row {row} is over {MAX_LINE_BYTES} bytes", "is this a jsonl file?")
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise unusable(
                    f"{self._where}: row {row} is not JSON: {error}", "each line must be one whole JSON object"
                ) from None
            if not isinstance(record, dict):
                raise unusable(f"{self._where}: row {row} is not a JSON object", 'write {"name": value, ...} per line')
            yield record, end

    def _index(self, file: BinaryIO, scan: TargetScan | None) -> tuple[list[int], list[int]]:
        head = list(islice(self._records(file, 0), 1000))
        decoded = sum(8 * int(np.prod(shape, dtype=np.int64)) for shape in self._shapes.values()) + 8
        chunk_rows = chunk_rows_for(head[-1][1] / len(head), decoded, self._block_bytes)
        file.seek(0)
        offsets, starts, row, end = [0], [0], 0, 0
        values: list[Any] = []
        for record, end in self._records(file, 0):
            row += 1
            self._check(record, row)
            if scan is not None:
                values.append(record[self.fields.target or ""])
            if row % chunk_rows == 0:
                self._scan(scan, values, row)
                offsets.append(end)
                starts.append(row)
        self._scan(scan, values, row)
        if starts[-1] != row:
            offsets.append(end)
            starts.append(row)
        return offsets, starts

    def _check(self, record: _Record, row: int) -> None:
        for name in (*self._features, *((self.fields.target,) if self.fields.target is not None else ())):
            if name not in record:
                raise unknown_name(f"{self._where}: row {row}", "field", name, tuple(record))
        for name, shape in self._shapes.items():
            array = self._array(record[name], name, row)
            if array.shape != shape:
                raise unusable(
                    f"{self._where}: row {row}: {name!r} has the shape {list(array.shape)}, "
                    f"in row 1 it is {list(shape)}",
                    "every row must have the same number of values",
                )
            self._whole = self._whole and array.dtype.kind in "bi"

    def _array(self, value: object, name: str, row: int) -> Array:
        try:
            array = np.asarray(value)
        except (ValueError, OverflowError):
            raise unusable(
                f"{self._where}: row {row}: {name!r} is a list of lists of different lengths", "make them equally long"
            ) from None
        if array.dtype.kind not in "biuf":
            raise unusable(
                f"{self._where}: row {row}: {name!r} is {json.dumps(value)[:80]}, neither a number nor a list of them",
                "name fields of numbers in data.features, or correct the row",
            )
        return array

    def _scan(self, scan: TargetScan | None, values: list[Any], row: int) -> None:
        if scan is not None and values:
            scan.add(self._target(values, row - len(values)), row - len(values))
        values.clear()

    def _target(self, values: list[Any], first_row: int) -> Array:
        texts = [isinstance(value, str) for value in values]
        if any(texts):
            if not all(texts):
                row = first_row + texts.index(not texts[0]) + 1
                raise unusable(
                    f"{self._where}: row {row}: {self.fields.target!r} mixes text and numbers", "write all labels alike"
                )
            return self._cells.of(values)
        name = self.fields.target or ""
        arrays = [self._array(value, name, row) for row, value in enumerate(values, first_row + 1)]
        if any(array.shape != arrays[0].shape for array in arrays):
            row = first_row + 1 + next(i for i, array in enumerate(arrays) if array.shape != arrays[0].shape)
            raise unusable(f"{self._where}: row {row}: {name!r} has another shape than before", "make all rows alike")
        return np.stack(arrays)

    def read(self, chunk: int) -> Chunk:
        first, count = int(self.starts[chunk]), int(self.starts[chunk + 1] - self.starts[chunk])
        with self.path.open("rb") as file:
            file.seek(self._offsets[chunk])
            records = [record for record, _ in islice(self._records(file, first), count)]
        if len(records) != count:
            raise unusable(f"{self._where} changed while it was read", "leave data files alone during a job")
        parts = [self._column(records, name, first) for name in self._features]
        features = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        target = None
        if self.fields.target is not None:
            target = self._target([record[self.fields.target] for record in records], first)
        return features.reshape(count, *self.feature_shape), target

    def _column(self, records: list[_Record], name: str, first_row: int) -> Array:
        with np.errstate(over="ignore"):
            try:
                column = np.asarray([record[name] for record in records], dtype=self.feature_dtype)
            except (ValueError, TypeError, KeyError, OverflowError):
                raise unusable(
                    f"{self._where}: near row {first_row + 1}: {name!r} cannot be read",
                    "leave data files alone during a job",
                ) from None
        return column.reshape(len(records), -1) if len(self._features) > 1 else column
