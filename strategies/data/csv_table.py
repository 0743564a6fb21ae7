"""A csv file with a header: numeric feature columns, and a target column of numbers or text labels.

One streaming pass at opening splits the file into chunks of a fixed number of records and looks at every target; cells
of features are parsed when their chunk is read. Quoted fields may hold delimiters, quotes and newlines. Empty lines are
not rows. The delimiter is the comma, or the tab or semicolon when the header has no comma.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from strategies.data.chunks import TEXT_BLOCK_BYTES, TEXT_WINDOW_BLOCKS, Chunk, chunk_rows_for
from strategies.data.dataset import Array
from strategies.data.rows import Fields
from strategies.data.source import unknown_name, unusable
from strategies.data.target import Cells, TargetScan

MAX_LINE_BYTES = 16 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"


class CsvFile:
    feature_dtype = "float32"
    window_blocks = TEXT_WINDOW_BLOCKS

    def __init__(self, path: Path, where: str, fields: Fields, block_bytes: int = TEXT_BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self.path = path
        self._where = where
        with path.open("rb") as file:
            self._delimiter = _delimiter(file.readline(MAX_LINE_BYTES))
            file.seek(0)
            records = _Records(file, where, self._delimiter)
            header = next(records, None)
            if header is None:
                raise unusable(
                    f"{where}: the file is empty", "the first line names the columns, each next one is a row"
                )
            self._columns = [name.strip() for name in header]
            self.fields = self._resolve(fields)
            features = self.fields.features or ()
            self._feature_at = [self._columns.index(name) for name in features]
            self._target_at = None if self.fields.target is None else self._columns.index(self.fields.target)
            self.feature_shape = (len(features),)
            scan = None if self.fields.target is None else TargetScan(where, self.fields.target)
            self._offsets, starts = self._index(records, scan)
        self._cells = Cells()
        self.starts = np.asarray(starts, dtype=np.int64)
        self.target = scan.summary() if scan else None

    def _resolve(self, fields: Fields) -> Fields:
        wanted = (fields.features,) if isinstance(fields.features, str) else fields.features
        for name in (*(wanted or ()), *((fields.target,) if fields.target is not None else ())):
            if name not in self._columns:
                raise unknown_name(self._where, "column", name, tuple(self._columns))
            if self._columns.count(name) > 1:
                raise unusable(f"{self._where}: two columns are called {name!r}", "give every column its own name")
        if wanted is None:
            wanted = tuple(name for name in self._columns if name != fields.target)
            twice = next((name for name in wanted if wanted.count(name) > 1), None)
            if twice is not None:
                raise unusable(f"{self._where}: two columns are called {twice!r}", "choose columns by data.features")
        if not wanted:
            raise unusable(f"{self._where}: no column is left for the features", "set data.features")
        return Fields(wanted, fields.target)

    def _index(self, records: _Records, scan: TargetScan | None) -> tuple[list[int], list[int]]:
        """Byte offset and first row of each chunk, with the end of the file and the number of rows at the end."""
        offsets, starts, row, header_lines = [records.end], [0], 0, records.line
        head = list(islice(records, 1000))
        mean = (records.end - offsets[0]) / max(1, len(head))
        chunk_rows = chunk_rows_for(mean, 4 * self.feature_shape[0] + 8, self._block_bytes)
        width = len(self._columns)
        cells: list[str] = []
        records.restart(offsets[0], header_lines)
        for record in records:
            if len(record) != width:
                raise unusable(
                    f"{self._where}: row {row + 1} (line {records.line}) has {len(record)} fields, "
                    f"the header has {width}",
                    "every row needs one field per column; quote fields that hold the delimiter",
                )
            if self._target_at is not None:
                cells.append(record[self._target_at])
            row += 1
            if row % chunk_rows == 0:
                _flush(scan, cells, row)
                offsets.append(records.end)
                starts.append(row)
        _flush(scan, cells, row)
        if starts[-1] != row:
            offsets.append(records.end)
            starts.append(row)
        return offsets, starts

    def read(self, chunk: int) -> Chunk:
        count = int(self.starts[chunk + 1] - self.starts[chunk])
        with self.path.open("rb") as file:
            file.seek(self._offsets[chunk])
            records = list(islice(_Records(file, self._where, self._delimiter), count))
        if len(records) != count:
            raise unusable(f"{self._where} changed while it was read", "leave data files alone during a job")
        features = self._numbers(records, int(self.starts[chunk]))
        if self._target_at is None or self.target is None:
            return features, None
        return features, self._cells.of([record[self._target_at] for record in records], self.target)

    def _numbers(self, records: Sequence[list[str]], first_row: int) -> Array:
        out = np.empty((len(records), len(self._feature_at)), dtype=np.float32)
        try:
            columns = list(zip(*records, strict=True))
            with np.errstate(over="ignore"):
                for place, column in enumerate(self._feature_at):
                    out[:, place] = np.fromiter(map(float, columns[column]), dtype=np.float64, count=len(records))
        except (ValueError, IndexError):
            raise self._bad_cell(records, first_row) from None
        return out

    def _bad_cell(self, records: Sequence[list[str]], first_row: int) -> Exception:
        for row, record in enumerate(records, first_row + 1):
            for column in self._feature_at:
                try:
                    float(record[column])
                except (ValueError, IndexError):
                    cell = record[column][:80] if column < len(record) else ""
                    what = f"is {cell!r}, which is not a number" if cell.strip() else "is empty"
                    return unusable(
                        f"{self._where}: row {row}: column {self._columns[column]!r} {what}",
                        "list the numeric columns in data.features, or correct the cell",
                    )
        return unusable(f"{self._where} changed while it was read", "leave data files alone during a job")


class _Records(Iterator[list[str]]):
    """Records of a csv file from where it stands; `end` is the byte offset after the last one given out."""

    def __init__(self, file: BinaryIO, where: str, delimiter: str) -> None:
        self._file = file
        self._where = where
        self._delimiter = delimiter
        self.restart(file.tell(), 0)

    def restart(self, offset: int, line: int) -> None:
        """Read on from a byte offset, before which there are `line` lines."""
        self._file.seek(offset)
        self.end = offset
        self._lines_before = line
        self._reader = csv.reader(self._lines(), delimiter=self._delimiter, strict=True)

    @property
    def line(self) -> int:
        """Number of the last line read, counted from 1 where `restart` was told the truth."""
        return self._lines_before + self._reader.line_num

    def _lines(self) -> Iterator[str]:
        while line := self._file.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES:
                raise unusable(f"{self._where}: a line is over {MAX_LINE_BYTES} bytes", "is this a csv file?")
            if self.end == 0 and line.startswith(_BOM):
                self.end = len(_BOM)
                line = line[len(_BOM) :]
            self.end += len(line)
            yield line.decode()

    def __next__(self) -> list[str]:
        try:
            while not (record := next(self._reader)):
                pass  # an empty line
            return record
        except csv.Error as error:
            what = "a carriage return outside quotes" if "new-line" in str(error) else str(error)
            raise unusable(
                f"{self._where}: line {self.line}: {what}", "end lines with a newline, quote fields that hold one"
            ) from None
        except UnicodeDecodeError as error:
            raise unusable(
                f"{self._where}: line {self.line + 1} is not UTF-8: {error.reason}", "save the file as UTF-8"
            ) from None


def _flush(scan: TargetScan | None, cells: list[str], row: int) -> None:
    if scan is not None and cells:
        values = np.empty(len(cells), dtype=object)
        values[:] = cells
        scan.add(values, row - len(cells))
    cells.clear()


def _delimiter(header: bytes) -> str:
    if b"," not in header:
        for candidate in ("\t", ";"):
            if candidate.encode() in header:
                return candidate
    return ","
