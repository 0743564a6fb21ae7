"""Text: sequences of bytes and the same shifted by one, from one file, a folder or memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.errors import SpecError
from protos.jobspec import DataSpec
from strategies.data import Dataset, open_splits
from strategies.data.text import Corpus, ManyTexts, OneText, TextRows, corpus_of


def opened(path: Path, **fields: Any) -> Dataset:
    return open_splits(DataSpec(source=path.name, **fields), path, None, loss="causal_lm").train


def test_the_target_is_the_text_shifted_by_one(tmp_path: Path) -> None:
    content = bytes(range(97, 123))
    (tmp_path / "a.txt").write_bytes(content)
    dataset = opened(tmp_path / "a.txt", sequence_length=5)
    batch = dataset.batch(np.asarray([4, 0]))
    assert dataset.rows == 5
    assert np.asarray(batch.features).tolist() == [list(content[20:25]), list(content[0:5])]
    assert batch.target is not None
    assert batch.target.tolist() == [list(content[21:26]), list(content[1:6])]
    assert np.asarray(batch.features).flags.c_contiguous
    assert batch.target.flags.c_contiguous
    assert (dataset.feature_shapes, dataset.feature_dtypes, dataset.target_shape) == ((5,), "int64", (5,))
    assert dataset.classes == 256


def test_the_default_sequence_has_128_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    assert opened(tmp_path / "a.txt").feature_shapes == (128,)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.binary(max_size=30), min_size=1, max_size=8), st.integers(1, 12))
def test_files_read_piece_by_piece_are_the_same_as_one_text(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], length: int
) -> None:
    whole = b"".join(parts)
    if len(whole) <= length:
        return
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / f"{number}.txt" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part)
    corpora: list[Corpus] = [
        OneText(np.frombuffer(whole, np.uint8)),
        ManyTexts(paths),
        corpus_of(paths),
        corpus_of(paths, in_memory_bytes=0),
    ]
    rows = [TextRows("texts", corpus, length) for corpus in corpora]
    indices = np.arange(rows[0].rows)[::-1]
    expected = [list(whole[row * length : row * length + length]) for row in indices]
    for one in rows:
        features, target = one.gather(indices)
        assert features.tolist() == expected
        assert target[:, :-1].tolist() == features[:, 1:].tolist()


def test_more_files_than_are_held_open_are_read(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:03}.txt" for number in range(150)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 10)
    features, _ = TextRows("texts", ManyTexts(paths), 7).gather(np.arange(200))
    assert features.reshape(-1).tolist() == [number for number in range(150) for _ in range(10)][:1400]


def test_a_large_text_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc" * 1000)
    corpus = corpus_of([path], in_memory_bytes=0)
    assert isinstance(corpus, OneText)
    assert TextRows("a.txt", corpus, 3).gather(np.asarray([5]))[0].tolist() == [[97, 98, 99]]


def test_a_folder_of_texts_is_one_corpus_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "books" / "sub").mkdir(parents=True)
    for name, content in (("b.txt", "cd"), ("a.md", "ab"), ("sub/c.py", "ef"), ("ignored.bin", "zz")):
        (tmp_path / "books" / name).write_text(content)
    batch = opened(tmp_path / "books", sequence_length=5).batch(np.asarray([0]))
    assert bytes(np.asarray(batch.features)[0].astype(np.uint8)) == b"abcde"


def test_a_text_too_short_for_one_sequence_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 8)
    with pytest.raises(SpecError, match="less than one sequence of 8"):
        opened(tmp_path / "a.txt", sequence_length=8)
    with pytest.raises(SpecError, match="no columns"):
        opened(tmp_path / "a.txt", target="y")


def test_the_standard_library_is_a_text_with_a_test_split() -> None:
    spec = DataSpec(source="builtin:stdlib", args={"limit_bytes": 100_000}, sequence_length=64)
    found = open_splits(spec, None, None)
    assert found.test is not None
    assert found.train.rows + found.test.rows == (100_000 - 1) // 64
    assert found.train.digest == open_splits(spec, None, None).train.digest
    text = bytes(np.asarray(found.train.batch(np.arange(found.train.rows)).features).astype(np.uint8).reshape(-1))
    assert b"import" in text
    with pytest.raises(SpecError, match="limit_bytes"):
        open_splits(DataSpec(source="builtin:stdlib", args={"limit_bytes": "all"}), None, None)
