"""Opening: splits, digests, shards, files that are not what their name says, and data from a user's function."""

from __future__ import annotations

import gzip
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.errors import Blame, ErrorCode, SpecError
from protos.jobspec import DataSpec
from strategies.data import Batch, Dataset, Splits, open_dataset, open_splits


def splits(folder: Path, loss: str = "", **fields: Any) -> Splits:
    spec = DataSpec(**fields)
    test = None if spec.test is None else folder / spec.test
    return open_splits(spec, folder / spec.source, None, test_path=test, loss=loss)


def everything(dataset: Dataset | None) -> Batch:
    assert dataset is not None
    return dataset.batch(np.arange(dataset.rows, dtype=np.int64))


def features(dataset: Dataset | None) -> list[Any]:
    return np.asarray(everything(dataset).features).tolist()  # type: ignore[no-any-return]


def target(dataset: Dataset | None) -> list[Any]:
    found = everything(dataset).target
    assert found is not None
    return found.tolist()  # type: ignore[no-any-return]


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_a_test_file_uses_the_labels_of_the_training_file(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "x,y\n1,b\n2,a\n3,c\n")
    write(tmp_path / "test.csv", "y,other,x\nc,9,7\nb,9,8\n")
    found = splits(tmp_path, source="train.csv", target="y", test="test.csv")
    assert features(found.test) == [[7], [8]]
    assert target(found.test) == [2, 1]
    write(tmp_path / "test.csv", "x,y\n7,c\n8,d\n")
    with pytest.raises(SpecError, match=r"test\.csv: row 2: 'y' is 'd', which is not among the labels"):
        splits(tmp_path, source="train.csv", target="y", test="test.csv")


@pytest.mark.parametrize(
    ("test", "said"),
    [("x,z\n1,0\n", "no column 'y'"), ("x,y\n1,0.5\n", "another kind"), ("z,y\n1,0\n", "no column 'x'")],
)
def test_a_test_file_that_does_not_match_is_refused(tmp_path: Path, test: str, said: str) -> None:
    write(tmp_path / "train.csv", "x,y\n1,0\n2,1\n")
    write(tmp_path / "test.csv", test)
    with pytest.raises(SpecError, match=said):
        splits(tmp_path, source="train.csv", target="y", test="test.csv")


def test_a_test_fraction_takes_the_last_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "x,y\n" + "".join(f"{row},0\n" for row in range(10)))
    found = splits(tmp_path, source="a.csv", target="y", test_fraction=0.3)
    assert features(found.train) == [[row] for row in range(7)]
    assert features(found.test) == [[7], [8], [9]]
    write(tmp_path / "b.csv", "x,y\n1,0\n")
    with pytest.raises(SpecError, match="too few"):
        splits(tmp_path, source="b.csv", target="y", test_fraction=0.3)


def test_one_split_can_be_opened_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "x,y\n1,0\n2,0\n")
    spec = DataSpec(source="a.csv", target="y")
    assert features(open_dataset(spec, tmp_path / "a.csv", None)) == [[1], [2]]
    assert open_dataset(spec, tmp_path / "a.csv", None, split="test") is None


def test_the_digest_follows_content_and_what_changes_the_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "x,y\n1,0\n2,0\n")
    write(tmp_path / "moved/b.csv", "x,y\n1,0\n2,0\n")
    write(tmp_path / "c.csv", "x,y\n1,0\n3,0\n")

    def digest(name: str, **fields: Any) -> str:
        return splits(tmp_path, source=name, target="y", **fields).train.digest

    assert digest("a.csv") == digest("moved/b.csv") == digest("a.csv", features="x")
    assert len({digest("a.csv"), digest("c.csv"), digest("a.csv", test_fraction=0.5)}) == 3
    spec = DataSpec(source="a.csv", target="y")
    known = open_splits(spec, tmp_path / "a.csv", None, digest="1" * 64).train.digest
    assert known == open_splits(spec, tmp_path / "c.csv", None, digest="1" * 64).train.digest


def test_shards_of_a_folder_are_joined_in_name_order(tmp_path: Path) -> None:
    write(tmp_path / "shards/2.csv", "x,y\n3,cat\n")
    write(tmp_path / "shards/1.csv", "x,y\n1,dog\n2,ant\n")
    write(tmp_path / "shards/.hidden.csv", "junk")
    write(tmp_path / "shards/README.md", "about")
    dataset = splits(tmp_path, source="shards", target="y").train
    assert features(dataset) == [[1], [2], [3]]
    assert target(dataset) == [2, 0, 1]
    assert np.asarray(dataset.batch(np.asarray([2, 0])).features).tolist() == [[3], [1]]
    write(tmp_path / "shards/3.csv", "z,y\n3,cat\n")
    with pytest.raises(SpecError, match=r"3\.csv: no column 'x'"):
        splits(tmp_path, source="shards", target="y")


def test_shards_of_npz_are_joined(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for number in range(3):
        np.savez(tmp_path / f"shards/{number}.npz", x=np.full((2, 1), number), y=np.full(2, number * 0.5))
    dataset = splits(tmp_path, source="shards").train
    assert features(dataset) == [[0], [0], [1], [1], [2], [2]]
    assert target(dataset) == [[0], [0], [0.5], [0.5], [1], [1]]
    np.savez(tmp_path / "shards/3.npz", x=np.ones((2, 2)), y=np.ones(2))
    with pytest.raises(SpecError, match=r"3\.npz: rows have other shapes"):
        splits(tmp_path, source="shards")


def test_a_folder_that_is_mixed_or_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match="holds no data"):
        splits(tmp_path, source="empty")
    write(tmp_path / "mixed/a.csv", "x,y\n1,2\n")
    write(tmp_path / "mixed/b.jsonl", "{}")
    with pytest.raises(SpecError, match="csv and jsonl"):
        splits(tmp_path, source="mixed")


def test_a_missing_file_says_where_paths_begin(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"a\.csv does not exist") as error:
        splits(tmp_path, source="a.csv")
    assert "relative to the job file" in error.value.hint
    assert error.value.code is ErrorCode.DATA_UNUSABLE


def test_a_file_is_what_it_contains_not_what_it_is_called(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((2, 1)))
    (tmp_path / "a.npz").rename(tmp_path / "a.csv")
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(b"{}"))
    write(tmp_path / "c.npz", "x,y\n1,2\n")
    write(tmp_path / "d.parquet", "x,y\n1,2\n")
    (tmp_path / "e.csv").write_bytes("x,y\n1,2\n".encode("utf-16"))
    write(tmp_path / "f.weird", "x,y\n1,2\n")
    for name, said in (
        ("a.csv", "is not csv: it is a zip archive"),
        ("b.jsonl", "compressed with gzip"),
        ("c.npz", "is not npz"),
        ("d.parquet", "is not parquet"),
        ("e.csv", "UTF-16"),
        ("f.weird", "not recognised"),
    ):
        with pytest.raises(SpecError, match=said) as error:
            splits(tmp_path, source=name)
        assert error.value.hint
    (tmp_path / "a.csv").rename(tmp_path / "nameless")
    assert features(splits(tmp_path, source="nameless").train) == [[1], [1]]


@pytest.mark.parametrize("name", ["x.npz", "x.parquet", "x.csv", "x.jsonl", "x.bin"])
def test_an_empty_file_is_called_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(SpecError, match="is empty"):
        splits(tmp_path, source=name)


def test_causal_lm_needs_tokens(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"builtin:iris: loss causal_lm .* are float32") as refused:
        open_splits(DataSpec(source="builtin:iris"), None, None, loss="causal_lm")
    assert refused.value.code is ErrorCode.DATA_UNUSABLE
    (tmp_path / "t.txt").write_text("many words " * 30)
    text = DataSpec(source="t.txt", sequence_length=8)
    assert open_splits(text, tmp_path / "t.txt", None, loss="causal_lm").train.rows
    np.savez(tmp_path / "t.npz", x=np.ones((4, 5), dtype=np.int32))
    assert open_splits(DataSpec(source="t.npz"), tmp_path / "t.npz", None, loss="causal_lm").train.rows == 4


def test_a_loss_that_needs_a_target_says_so(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "x,y\n1,0\n2,0\n")
    with pytest.raises(SpecError, match="mse needs a target"):
        splits(tmp_path, "mse", source="a.csv")


def test_a_sequence_length_is_only_for_text(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "x,y\n1,0\n")
    for source in ("a.csv", "builtin:iris"):
        with pytest.raises(SpecError, match="sequence_length"):
            splits(tmp_path, source=source, sequence_length=4)


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Path]:
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before


CODE = """
    import numpy as np
    import neighbour

    def pair(rows=4): return np.arange(rows * 2.0).reshape(rows, 2), np.arange(rows) % 2
    def four(): return [[1.0]], [0], [[2.0], [3.0]], [1, 0]
    def four_arrays(): return tuple(map(np.asarray, four()))
    def named(): return {"image": np.ones((3, 2)), "label": np.asarray([0, 1, 2])}
    def train_and_test(): return {"train": pair(), "test": pair(2)}
    def words(): return "to be or not to be"
    def inputs(): return {"a": np.ones((3, 1)), "b": np.ones((3, 2))}, np.asarray([0.5, 1, 2])
    def borrowed(): return neighbour.ROWS, neighbour.LABELS
    def items(): return Items()
    def both(): return Items(), Items()
    def tensors():
        class Tensor:
            def __init__(self, value): self.value = np.asarray(value)
            def detach(self): return self
            def cpu(self): return self
            def numpy(self): return self.value
        return Tensor([[1.0], [2.0]]), Tensor([1, 0])
    def dicts(): return Dicts()
    def nothing(): return None
    def fails(): raise ValueError("no such disease")
    def text_features(): return np.asarray([["a"]]), np.asarray([1])
    def uneven(): return np.ones((3, 1)), np.ones(2)

    class Items:
        def __len__(self): return 5
        def __getitem__(self, row):
            if row == 4: raise KeyError("broken")
            return np.full(2, row, dtype=np.float64), row

    class Dicts:
        def __len__(self): return 3
        def __getitem__(self, row): return {"ids": [row, row], "mask": [1.0, 0.0], "labels": row}
"""


def call(folder: Path, function: str, loss: str = "", **fields: Any) -> Splits:
    (folder / "data.py").write_text(textwrap.dedent(CODE))
    (folder / "neighbour.py").write_text(
        "import numpy as np\nROWS = np.ones((2, 1))\nLABELS = np.asarray(['u', 'v'])\n"
    )
    return open_splits(DataSpec(source=f"data.py:{function}", **fields), None, folder, loss=loss)


def test_a_function_may_return_arrays_of_many_kinds(module: Path) -> None:
    assert features(call(module, "pair", args={"rows": 2}).train) == [[0, 1], [2, 3]]
    assert target(call(module, "pair").train) == [0, 1, 0, 1]
    for name in ("four", "four_arrays"):
        four = call(module, name)
        assert (features(four.train), features(four.test), target(four.test)) == ([[1]], [[2], [3]], [1, 0])
    named = call(module, "named", features="image").train
    assert (named.feature_shapes, target(named)) == ((2,), [0, 1, 2])
    both = call(module, "train_and_test")
    assert (both.train.rows, features(both.test)) == (4, [[0, 1], [2, 3]])
    assert target(call(module, "borrowed").train) == [0, 1]
    assert features(call(module, "tensors").train) == [[1], [2]]
    inputs = call(module, "inputs").train
    assert inputs.feature_shapes == {"a": (1,), "b": (2,)}
    assert inputs.target_shape == (1,)


def test_a_function_may_return_text(module: Path) -> None:
    dataset = call(module, "words", sequence_length=5).train
    assert bytes(np.asarray(dataset.batch(np.asarray([1])).features)[0].astype(np.uint8)) == b" or n"


def test_a_function_may_return_objects_with_items(module: Path) -> None:
    dataset = call(module, "items", "cross_entropy").train
    batch = dataset.batch(np.asarray([3, 1]))
    assert np.asarray(batch.features).tolist() == [[3, 3], [1, 1]]
    assert batch.target is not None
    assert batch.target.tolist() == [3, 1]
    assert (dataset.rows, dataset.feature_dtypes, dataset.target_dtype) == (5, "float32", "int64")
    with pytest.raises(SpecError, match="item 4 raised KeyError") as error:
        dataset.batch(np.asarray([4]))
    assert error.value.blame is Blame.USER_CODE
    assert call(module, "both").test is not None
    dicts = call(module, "dicts", "cross_entropy").train.batch(np.asarray([2]))
    assert isinstance(dicts.features, dict)
    assert dicts.features["ids"].tolist() == [[2, 2]]
    assert dicts.target is not None
    assert dicts.target.tolist() == [2]


def test_the_digest_of_a_function_is_that_of_its_rows(module: Path) -> None:
    assert call(module, "pair").train.digest == call(module, "pair").train.digest
    assert call(module, "pair").train.digest != call(module, "pair", args={"rows": 5}).train.digest
    assert call(module, "items").train.digest == call(module, "items").train.digest


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("pairs", "no function 'pairs'; nearest: 'pair'"),
        ("nothing", "returned a NoneType"),
        ("fails", "raised ValueError: no such disease at data.py:"),
        ("text_features", "not numbers"),
        ("uneven", "differ in length"),
    ],
)
def test_what_is_wrong_with_a_function_is_named(module: Path, function: str, said: str) -> None:
    with pytest.raises(SpecError) as error:
        call(module, function)
    assert said in error.value.message, error.value.message
    assert error.value.hint


def test_a_function_called_wrongly_or_missing_is_named(module: Path) -> None:
    with pytest.raises(SpecError, match="unexpected keyword argument 'row'"):
        call(module, "pair", args={"row": 2})
    with pytest.raises(SpecError, match=r"there is no other\.py"):
        open_splits(DataSpec(source="other.py:fn"), None, module)
    (module / "broken.py").write_text("def build(:\n")
    with pytest.raises(SpecError, match="SyntaxError"):
        open_splits(DataSpec(source="broken.py:build"), None, module)
