"""npz files, folders of classes and builtin datasets."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.errors import SpecError
from protos.jobspec import DataSpec
from strategies.data import Batch, Dataset, Splits, open_splits
from strategies.data.arrays import ArrayRows
from strategies.data.npz import read_npz
from strategies.data.rows import CodedDataset, Fields


def splits(path: Path, loss: str = "", **fields: Any) -> Splits:
    return open_splits(DataSpec(source=path.name, **fields), path, None, loss=loss)


def builtin(name: str, **fields: Any) -> Splits:
    return open_splits(DataSpec(source=f"builtin:{name}", **fields), None, None)


def everything(dataset: Dataset) -> Batch:
    return dataset.batch(np.arange(dataset.rows, dtype=np.int64))


def features(dataset: Dataset) -> np.ndarray[Any, np.dtype[Any]]:
    return np.asarray(everything(dataset).features)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npz_gives_its_rows_stored_or_compressed(tmp_path: Path, save: Any, order: Any) -> None:
    x, y = np.random.default_rng(0).normal(size=(50, 3, 4)), np.arange(50)
    save(tmp_path / "a.npz", x=np.asarray(x, order=order), y=y)
    dataset = splits(tmp_path / "a.npz").train
    batch = dataset.batch(np.asarray([49, 0, 7]))
    assert np.array_equal(np.asarray(batch.features), x[[49, 0, 7]].astype(np.float32))
    assert batch.target is not None
    assert batch.target.tolist() == [49, 0, 7]
    assert (dataset.feature_shapes, dataset.feature_dtypes, dataset.classes) == ((3, 4), "float32", 50)
    raw = CodedDataset(ArrayRows("a.npz", read_npz(tmp_path / "a.npz", "a.npz"), Fields("x", "y")), None, "")
    assert np.array_equal(features(raw), x.astype(np.float32))


def test_a_large_npz_is_mapped_and_never_read_as_a_whole(tmp_path: Path) -> None:
    x = np.zeros((50_000, 200), dtype=np.float32)  # 40 MB
    x[:, 0] = np.arange(50_000)
    np.savez(tmp_path / "a.npz", x=x, y=np.zeros(50_000, dtype=np.int64))
    tracemalloc.start()
    rows = ArrayRows("a.npz", read_npz(tmp_path / "a.npz", "a.npz"), Fields("x", "y"))
    gathered, _ = rows.gather(np.asarray([3, 49_999, 12]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.asarray(gathered)[:, 0].tolist() == [3, 49_999, 12]
    assert peak < 4 * 1024 * 1024


def test_several_named_arrays_become_a_dict(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", ids=np.ones((4, 3), np.int32), mask=np.ones((4, 3), bool), label=np.arange(4))
    dataset = splits(tmp_path / "a.npz", features=["ids", "mask"]).train
    batch = dataset.batch(np.asarray([1, 2]))
    assert isinstance(batch.features, dict)
    assert {name: str(array.dtype) for name, array in batch.features.items()} == {"ids": "int64", "mask": "float32"}
    assert dataset.feature_shapes == {"ids": (3,), "mask": (3,)}
    assert batch.target is not None
    assert batch.target.tolist() == [1, 2]


def test_pixels_become_floats_and_token_ids_stay_whole(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.full((2, 2), 255, np.uint8))
    np.savez(tmp_path / "b.npz", x=np.full((2, 2), 50_000, np.uint16))
    assert features(splits(tmp_path / "a.npz").train).tolist() == [[255.0, 255.0]] * 2
    assert features(splits(tmp_path / "b.npz").train).dtype == np.int64


@pytest.mark.parametrize(
    ("arrays", "fields", "said"),
    [
        ({"images": np.ones((3, 2)), "y": np.ones(3)}, {"features": "imges"}, "nearest: 'images'"),
        ({"x": np.ones((3, 2)), "y": np.ones(4)}, {}, "'x' 3 rows, 'y' 4 rows"),
        ({"a": np.ones((3, 2)), "b": np.ones((3, 2)), "y": np.ones(3)}, {}, "which of its arrays"),
        ({"x": np.asarray([["a"], ["b"]]), "y": np.ones(2)}, {}, "not numbers"),
        ({"x": np.ones((0, 2)), "y": np.ones(0)}, {}, "no rows"),
        ({"x": np.float32(1)}, {}, "no rows"),
    ],
)
def test_what_is_wrong_with_an_npz_is_named(
    tmp_path: Path, arrays: dict[str, Any], fields: dict[str, Any], said: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SpecError) as error:
        splits(tmp_path / "a.npz", **fields)
    assert said in error.value.message, error.value.message


def test_objects_in_an_npz_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    np.savez(tmp_path / "a.npz", x=np.asarray([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(SpecError, match="never loaded"):
        splits(tmp_path / "a.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.fixture(scope="module")
def npz_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    np.savez(path, x=np.ones((5, 2)), y=np.arange(5))
    return path, path.read_bytes()


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_damaged_npz_is_a_spec_error_and_nothing_else(npz_bytes: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = npz_bytes
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))])
    for place in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=6)) if damaged else []:
        damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(damaged))
    try:
        everything(splits(path).train)
    except SpecError as error:
        assert error.hint


def test_a_member_that_claims_to_be_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999, 9), }".ljust(
        117
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header + b"\n" + b"\0" * 80)
    with pytest.raises(SpecError, match="header says otherwise"):
        splits(tmp_path / "a.npz")


def test_labels_of_text_in_an_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((3, 1)), y=np.asarray(["dog", "cat", "dog"]))
    dataset = splits(tmp_path / "a.npz", "cross_entropy").train
    assert everything(dataset).target.tolist() == [1, 0, 1]  # type: ignore[union-attr]
    assert dataset.class_names == ("cat", "dog")


def test_a_folder_per_class_is_a_classification(tmp_path: Path) -> None:
    for name, count in (("cat", 6), ("dog", 3)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(count):
            np.save(tmp_path / "pets" / name / f"{number}.npy", np.full((2, 2), number, np.float64))
    found = splits(tmp_path / "pets", "cross_entropy", test_fraction=0.34)
    assert found.test is not None
    assert (found.train.rows, found.test.rows, found.train.classes) == (6, 3, 2)
    assert set(everything(found.test).target.tolist()) == {0, 1}  # type: ignore[union-attr]
    assert found.train.class_names == ("cat", "dog")
    np.save(tmp_path / "pets" / "dog" / "9.npy", np.ones((3, 2)))
    with pytest.raises(SpecError, match=r"dog/9\.npy"):
        splits(tmp_path / "pets")


@pytest.mark.parametrize(
    ("name", "rows", "shape", "classes"),
    [
        ("digits", 1797, (64,), 10),
        ("iris", 150, (4,), 3),
        ("wine", 178, (13,), 3),
        ("breast_cancer", 569, (30,), 2),
        ("diabetes", 442, (10,), None),
    ],
)
def test_builtin_tables_have_a_fixed_split(name: str, rows: int, shape: tuple[int, ...], classes: int | None) -> None:
    found, again = builtin(name), builtin(name)
    assert found.test is not None
    assert found.train.rows + found.test.rows == rows
    assert found.test.rows == round(rows * 0.2)
    assert (found.train.feature_shapes, found.train.classes) == (shape, classes)
    assert found.train.digest == again.train.digest
    x = features(found.train)
    assert np.array_equal(x, features(again.train))
    assert x.dtype == np.float32
    if name == "digits":
        assert (x.min(), x.max()) == (0, 1)
    else:
        assert np.allclose(x.mean(axis=0), 0, atol=1e-5)
        assert np.allclose(x.std(axis=0), 1, atol=1e-4)
    if classes is None:
        assert found.train.target_shape == (1,)
    else:
        assert set(everything(found.test).target.tolist()) == set(range(classes))  # type: ignore[union-attr]


def test_digits_can_be_images() -> None:
    assert builtin("digits", args={"image": True}).train.feature_shapes == (1, 8, 8)
    with pytest.raises(SpecError, match="image"):
        builtin("digits", args={"image": "yes"})


def test_the_split_of_a_builtin_can_be_chosen() -> None:
    found = builtin("iris", test_fraction=0.5)
    assert found.test is not None
    assert found.test.rows == 75
    assert found.train.digest != builtin("iris").train.digest
