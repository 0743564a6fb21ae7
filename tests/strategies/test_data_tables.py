"""csv, jsonl and parquet: every row is found whatever the quoting and the chunk, and what is wrong is named."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from protos.errors import ErrorCode, SpecError
from protos.jobspec import DataSpec
from strategies.data import open_splits
from strategies.data.chunks import Chunk, ChunkCache, ChunkRows
from strategies.data.csv_table import CsvFile
from strategies.data.dataset import Batch, Dataset, epoch_order
from strategies.data.jsonl_table import JsonlFile
from strategies.data.parquet_table import ParquetFile
from strategies.data.rows import CodedDataset, Fields
from strategies.data.target import MAX_TEXT_LABELS, plan_coding
from strategies.sample_order import steps

TINY_CACHE_BYTES = 200


def opened(path: Path, loss: str = "", **fields: Any) -> Dataset:
    return open_splits(DataSpec.model_validate({"source": path.name, **fields}), path, None, loss=loss).train


def everything(dataset: Dataset) -> Batch:
    return dataset.batch(np.arange(dataset.rows, dtype=np.int64))


def streamed(file: CsvFile | JsonlFile | ParquetFile) -> CodedDataset:
    """Read on demand through a cache that holds hardly anything."""
    coding = None if file.target is None else plan_coding(file.target, "", "file")
    return CodedDataset(ChunkRows(file, ChunkCache(TINY_CACHE_BYTES)), coding, "digest")


def text(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(NUMBERS, CELLS, st.integers(-5, 5)), min_size=1, max_size=40),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.integers(10, 400),
)
def test_a_csv_of_n_rows_gives_n_rows_whatever_the_quoting(
    rows: list[tuple[float, str, int]], quoting: int, end: str, bom: bool, block_bytes: int
) -> None:
    if quoting == csv.QUOTE_MINIMAL and end == "\n":  # then the writer does not quote a lone carriage return
        rows = [(number, remark.replace("\r", ""), count) for number, remark, count in rows]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=quoting, lineterminator=end)  # type: ignore[arg-type]
    writer.writerow(["number", "remark", "count"])
    writer.writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.csv"
        path.write_bytes(buffer.getvalue().encode("utf-8-sig" if bom else "utf-8"))
        dataset = streamed(CsvFile(path, "data.csv", Fields(("count", "number"), None), block_bytes))
        backwards = np.arange(len(rows), dtype=np.int64)[::-1]
        features = dataset.batch(backwards).features
    assert dataset.rows == len(rows)
    assert isinstance(features, np.ndarray)
    assert features[:, 0].tolist() == [row[2] for row in reversed(rows)]
    assert np.allclose(features[:, 1], np.asarray([row[0] for row in reversed(rows)], np.float32))


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.binary(max_size=200), st.text('a1,"\n\r.; -', max_size=120).map(lambda one: f"a,y\n{one}".encode()))
)
def test_a_broken_csv_is_a_spec_error_and_nothing_else(content: bytes) -> None:
    _only_spec_errors("data.csv", content)


CHOICES: list[dict[str, Any]] = [{}, {"target": "y"}, {"features": "a", "target": "y"}]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "y", "z"]), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(st.sampled_from(["a", "y", "z"]), JSON, max_size=3) | JSON, max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=200), RECORDS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode())))
def test_a_broken_jsonl_is_a_spec_error_and_nothing_else(content: bytes) -> None:
    _only_spec_errors("data.jsonl", content)


def _only_spec_errors(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        for loss in ("", "cross_entropy", "mse"):
            for fields in CHOICES:
                try:
                    everything(opened(path, loss, **fields))
                except SpecError as error:
                    assert error.message
                    assert error.hint


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(NUMBERS, st.lists(st.integers(-9, 9), min_size=3, max_size=3), st.sampled_from("abc"))).filter(
        any
    ),
    st.integers(10, 400),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_a_jsonl_of_n_rows_gives_n_rows_in_every_chunk_size(
    rows: list[tuple[float, list[int], str]], block_bytes: int, end: str
) -> None:
    lines = [json.dumps({"v": vector, "label": label, "n": number}) for number, vector, label in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = text(Path(folder) / "data.jsonl", end.join(lines))
        dataset = streamed(JsonlFile(path, "data.jsonl", Fields(("n", "v"), "label"), block_bytes))
        batch = everything(dataset)
    assert isinstance(batch.features, np.ndarray)
    assert batch.target is not None
    assert batch.features.dtype == np.float32
    assert np.allclose(batch.features, np.asarray([[number, *vector] for number, vector, _ in rows], np.float32))
    assert [dataset.class_names[label] for label in batch.target] == [label for _, _, label in rows]


def _csv(path: Path, rows: int) -> None:
    lines = [f"{row},{row * 0.5},{row % 7}" for row in range(rows)]
    text(path, "\n".join(["a,b,y", *lines]) + "\n")


def _jsonl(path: Path, rows: int) -> None:
    text(path, "\n".join(json.dumps({"a": row, "b": row * 0.5, "y": row % 7}) for row in range(rows)))


def _parquet(path: Path, rows: int) -> None:
    row = np.arange(rows)
    parquet.write_table(arrow.table({"a": row, "b": row * 0.5, "y": row % 7}), path, row_group_size=100)


@pytest.mark.parametrize(
    ("write", "open_file"),
    [
        (_csv, lambda path: CsvFile(path, "f", Fields(None, "y"), 1000)),
        (_jsonl, lambda path: JsonlFile(path, "f", Fields(None, "y"), 1000)),
        (_parquet, lambda path: ParquetFile(path, "f", Fields(None, "y"))),
    ],
)
def test_an_epoch_of_a_streamed_file_gives_every_row_its_own_values(
    tmp_path: Path,
    write: Callable[[Path, int], None],
    open_file: Callable[[Path], CsvFile | JsonlFile | ParquetFile],
) -> None:
    rows = 1003
    write(tmp_path / "file", rows)
    dataset = streamed(open_file(tmp_path / "file"))
    assert 1 < dataset.block_rows < rows
    order = epoch_order(dataset, 0, 0, True)
    batches = [dataset.batch(order.batch(step, 50)) for step in range(steps(dataset.rows, 50))]
    features = np.concatenate([np.asarray(batch.features) for batch in batches])
    target = np.concatenate([batch.target for batch in batches if batch.target is not None])
    assert sorted(features[:, 0].tolist()) == list(range(rows))
    assert np.array_equal(features[:, 1], features[:, 0] * np.float32(0.5))
    assert np.array_equal(target, features[:, 0].astype(np.int64) % 7)
    assert dataset.classes == 7


def test_the_cache_of_a_streamed_file_decodes_each_chunk_of_a_window_once(tmp_path: Path) -> None:
    _csv(tmp_path / "file", 1000)
    reads: list[int] = []

    class Counted(CsvFile):
        def read(self, chunk: int) -> Chunk:
            reads.append(chunk)
            return super().read(chunk)

    file = Counted(tmp_path / "file", "f", Fields(None, "y"), 1000)
    dataset = CodedDataset(ChunkRows(file, ChunkCache()), None, "digest")
    order = epoch_order(dataset, 0, 0, True)
    for step in range(steps(dataset.rows, 10)):
        dataset.batch(order.batch(step, 10))
    assert sorted(reads) == list(range(len(file.starts) - 1))


def test_text_targets_become_labels_by_sorted_order(tmp_path: Path) -> None:
    dataset = opened(text(tmp_path / "a.csv", "x,kind\n1,pear\n2,apple\n3,pear\n4,fig\n"), target="kind")
    assert dataset.class_names == ("apple", "fig", "pear")
    assert everything(dataset).target.tolist() == [2, 0, 2, 1]  # type: ignore[union-attr]
    assert dataset.target_dtype == "int64"


def test_float_targets_have_a_column_of_their_own(tmp_path: Path) -> None:
    dataset = opened(text(tmp_path / "a.csv", "x,price\n1,2.5\n2,3\n"), target="price")
    target = everything(dataset).target
    assert target is not None
    assert (target.shape, str(target.dtype), dataset.target_shape) == ((2, 1), "float32", (1,))
    assert dataset.classes is None


def test_a_target_over_what_32_bits_hold_is_refused_with_its_row(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "x,price\n1,2.5\n2,1e99\n")
    with pytest.raises(SpecError, match=r"row 2: 'price' is 1e\+99, over the 3.4e\+38") as error:
        everything(opened(path, target="price"))
    assert error.value.code is ErrorCode.DATA_UNUSABLE


@pytest.mark.parametrize(
    ("loss", "dtype", "shape"), [("cross_entropy", "int64", (2,)), ("", "int64", (2,)), ("mse", "float32", (2, 1))]
)
def test_the_loss_decides_what_whole_numbers_are(tmp_path: Path, loss: str, dtype: str, shape: tuple[int, ...]) -> None:
    target = everything(opened(text(tmp_path / "a.csv", "x,y\n1,4\n2,3\n"), loss, target="y")).target
    assert target is not None
    assert (str(target.dtype), target.shape) == (dtype, shape)


def test_whole_numbers_written_with_a_point_can_be_labels(tmp_path: Path) -> None:
    dataset = opened(text(tmp_path / "a.csv", "x,y\n1,2.0\n2,0.0\n"), "cross_entropy", target="y")
    assert everything(dataset).target.tolist() == [2, 0]  # type: ignore[union-attr]
    assert dataset.classes == 3


def test_columns_are_taken_in_the_order_named(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "a,b,c,y\n1,2,3,0\n")
    assert np.asarray(everything(opened(path, features=["c", "a"], target="y")).features).tolist() == [[3, 1]]
    assert np.asarray(everything(opened(path, target="y")).features).tolist() == [[1, 2, 3]]
    assert np.asarray(everything(opened(path, features="b", target="y")).features).tolist() == [[2]]


@pytest.mark.parametrize("delimiter", ["\t", ";"])
def test_tabs_and_semicolons_also_separate(tmp_path: Path, delimiter: str) -> None:
    path = text(tmp_path / "a.csv", "a,y\n1,2\n".replace(",", delimiter))
    assert np.asarray(everything(opened(path, target="y")).features).tolist() == [[1]]


def test_missing_numbers_written_as_nan_are_left_to_the_loss(tmp_path: Path) -> None:
    assert np.isnan(np.asarray(everything(opened(text(tmp_path / "a.csv", "a,y\nnan,2\n"), target="y")).features)).all()


@pytest.mark.parametrize(
    ("content", "fields", "said"),
    [
        ("age,income,y\n1,2,0\n", {"features": ["agee"], "target": "y"}, ["a.csv", "'agee'", "'age'"]),
        ("age,y\n1,0\n", {"target": "label"}, ["no column 'label'"]),
        ("age,y\n1,0\nold,1\n", {"target": "y"}, ["row 2", "'age'", "'old'"]),
        ("age,y\n1,0\n,1\n", {"target": "y"}, ["row 2", "'age'", "is empty"]),
        ("age,y\n1,0\n2,\n", {"target": "y"}, ["row 2", "'y'", "is empty"]),
        ("age,y\n1,0\n\n2\n", {"target": "y"}, ["row 2 (line 4)", "1 fields", "2"]),
        ('age,y\n1,0\n"2,0\n', {"target": "y"}, ["line 3"]),
        ("age,y\n1,0\n2\r,0\n", {"target": "y"}, ["line 3"]),
        ("age,age,y\n1,0,0\n", {"target": "y"}, ["two columns", "'age'"]),
        ("", {}, ["empty"]),
        ("age,y\n", {"target": "y"}, ["no rows"]),
        ("y\n1\n", {"target": "y"}, ["no column is left"]),
    ],
)
def test_what_is_wrong_with_a_csv_is_named(
    tmp_path: Path, content: str, fields: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(SpecError) as error:
        opened(text(tmp_path / "a.csv", content), **fields)
    assert error.value.code is ErrorCode.DATA_UNUSABLE
    assert all(part in error.value.message for part in said), error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("loss", "content", "said"),
    [
        ("cross_entropy", "x,y\n1,0.5\n", "not whole"),
        ("cross_entropy", "x,y\n1,-1\n2,1\n", "count from 0"),
        ("mse", "x,y\n1,cheap\n", "cheap"),
    ],
)
def test_a_target_the_loss_cannot_use_is_refused(tmp_path: Path, loss: str, content: str, said: str) -> None:
    path = text(tmp_path / "a.csv", content)
    if loss == "mse":  # text with two classes is fine as 0 and 1, for bce_with_logits
        assert everything(opened(path, loss, target="y")).target.shape == (1, 1)  # type: ignore[union-attr]
        return
    with pytest.raises(SpecError, match=said):
        opened(path, loss, target="y")


def test_a_csv_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,y\n1,2\n\xff\xfe1,3\n")
    with pytest.raises(SpecError, match="line 3 is not UTF-8"):
        opened(path, target="y")


def test_a_list_of_whole_numbers_in_jsonl_stays_whole(tmp_path: Path) -> None:
    path = text(tmp_path / "a.jsonl", '{"tokens": [1, 2], "next": [2, 3]}\n{"tokens": [3, 4], "next": [4, 5]}\n')
    dataset = opened(path, "causal_lm", features="tokens", target="next")
    batch = everything(dataset)
    assert np.asarray(batch.features).dtype == np.int64
    assert np.asarray(batch.features).tolist() == [[1, 2], [3, 4]]
    assert batch.target.tolist() == [[2, 3], [4, 5]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1, "y": 0}\n{"a": 1}\n', ["row 2", "'y'"]),
        ('{"a": 1, "y": 0}\n{"a": [1, 2], "y": 1}\n', ["row 2", "[2]"]),
        ('{"a": 1, "y": 0}\n{"a": "big", "y": 1}\n', ["row 2", "'a'", "big"]),
        ('{"a": 1, "y": 0}\n{"a": 1, "y": "one"}\n', ["row 2", "mixes"]),
        ('{"a": 1, "y": 0}\n{"a": 1,\n', ["row 2", "not JSON"]),
        ("[1, 2]\n", ["row 1", "not a JSON object"]),
        ("[" * 100_000, ["row 1", "not JSON"]),
    ],
)
def test_what_is_wrong_with_a_jsonl_is_named(tmp_path: Path, content: str, said: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        everything(opened(text(tmp_path / "a.jsonl", content), target="y"))
    assert all(part in error.value.message for part in said), error.value.message


def test_parquet_gives_numbers_lists_and_labels(tmp_path: Path) -> None:
    table = arrow.table(
        {
            "n": arrow.array([1, None, 3], arrow.int32()),
            "flag": [True, False, True],
            "v": arrow.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], arrow.list_(arrow.float32(), 2)),
            "kind": arrow.array(["b", "a", "b"]).dictionary_encode(),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    batch = everything(opened(tmp_path / "a.parquet", target="kind"))
    expected = np.asarray([[1, 1, 1, 2], [np.nan, 0, 3, 4], [3, 1, 5, 6]], np.float32)
    assert np.array_equal(np.asarray(batch.features), expected, equal_nan=True)
    assert batch.target.tolist() == [1, 0, 1]  # type: ignore[union-attr]


def test_what_is_wrong_with_a_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"age": [1, 2], "city": ["x", "y"], "y": [0, None], "v": [[1], [1, 2]]}), path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"features": "agge", "target": "y"}, "'age'"),
        ({"features": ["age", "city"]}, "'city' holds string"),
        ({"features": "age", "target": "y"}, "row 2: 'y' is empty"),
        ({"features": "v"}, "row 2: 'v'"),
    ]
    for fields, said in cases:
        with pytest.raises(SpecError, match=said):
            everything(opened(path, **fields))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SpecError, match="not a readable parquet"):
        opened(path)


def test_numbers_of_more_values_than_labels_may_have_are_decoded_once(tmp_path: Path) -> None:
    many = [f"{row},{row + 0.5}" for row in range(MAX_TEXT_LABELS + 5)]
    path = text(tmp_path / "1.csv", "\n".join(["x,y", *many]))
    dataset = streamed(CsvFile(path, "1.csv", Fields(None, "y")))
    assert dataset.batch(np.asarray([7, 10_004])).target.tolist() == [[7.5], [10_004.5]]  # type: ignore[union-attr]
    text(tmp_path / "2.csv", "x,y\n0,1.5\n1,3\n")
    joined = open_splits(DataSpec(source="shards", target="y"), tmp_path, None).train
    assert joined.batch(np.asarray([joined.rows - 2, 3])).target.tolist() == [[1.5], [3.5]]  # type: ignore[union-attr]
    text(path, "\n".join(["x,y", *many, "1,cheap"]))
    with pytest.raises(SpecError, match="more than 10000 distinct values"):
        opened(path, target="y")
