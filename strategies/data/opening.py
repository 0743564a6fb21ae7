"""Opens the splits of a job's data: the one place that knows every source.

`open_splits` is the whole of it; `open_dataset` gives one split. A source that is a FILE.py:FUNCTION runs the user's
code, so both are only ever called in a worker process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import blake3

from protos.jobspec import DataSpec, entry_point
from strategies.data import builtin, files, function
from strategies.data.dataset import Dataset
from strategies.data.rows import Fields, RowRange, Rows, dataset_of
from strategies.data.source import SourceKind, builtin_name, check, kind_of, unusable
from strategies.data.target import TargetCoding, TargetKind, needs_target, plan_coding


@dataclass(frozen=True, slots=True)
class Splits:
    train: Dataset
    test: Dataset | None


def open_splits(
    spec: DataSpec,
    path: Path | None,
    code_dir: Path | None,
    *,
    test_path: Path | None = None,
    digest: str | None = None,
    loss: str = "",
) -> Splits:
    """Train and test data of a job.

    `path` and `test_path` are where the files named by the spec lie here; `digest` is that of their content, when the
    caller knows it. `loss` says whether targets are labels or values where the data leave it open (whole numbers).
    Raises SpecError (data_unusable) naming the file, the column, the row and the nearest existing names.
    """
    train, test, content = _load(spec, check(spec), path, code_dir, digest)
    if not train.rows:
        raise unusable(f"{spec.source} has no rows", "give at least one row of data")
    if spec.test is not None:
        if test_path is None:
            raise unusable(f"test data {spec.test} are not on this machine", "submit the job again")
        test = files.load(test_path, spec.test, kind_of(spec.test), train.fields)
        _same_rows(spec, train, test)
    elif test is None and spec.test_fraction is not None:
        test_rows = max(1, round(train.rows * spec.test_fraction))
        if test_rows >= train.rows:
            raise unusable(f"{spec.source} has {train.rows} rows, too few for a test split", "remove test_fraction")
        cut = train.rows - test_rows
        train, test = RowRange(train, 0, cut), RowRange(train, cut, train.rows)
    if train.target is None and needs_target(loss):
        raise unusable(f"{spec.source}: loss {loss} needs a target and none is named", "set data.target")
    if loss == "causal_lm":
        _check_tokens(spec, train)
    coding = plan_coding(train.target, loss, spec.source) if train.target is not None else None
    whole = _digest(content, spec)
    return Splits(
        dataset_of(train, coding, whole),
        dataset_of(test, _test_coding(coding, spec, test), f"{whole}-test") if test is not None and test.rows else None,
    )


def open_dataset(
    spec: DataSpec,
    path: Path | None,
    code_dir: Path | None,
    *,
    split: Literal["train", "test"] = "train",
    test_path: Path | None = None,
    digest: str | None = None,
    loss: str = "",
) -> Dataset | None:
    """One split; None when there is no test split. Use `open_splits` for both: it opens the source once."""
    splits = open_splits(spec, path, code_dir, test_path=test_path, digest=digest, loss=loss)
    return splits.train if split == "train" else splits.test


def _load(
    spec: DataSpec, kind: SourceKind, path: Path | None, code_dir: Path | None, digest: str | None
) -> tuple[Rows, Rows | None, str]:
    features = tuple(spec.features) if isinstance(spec.features, list) else spec.features
    if features == ():
        raise unusable("data.features is an empty list", "name at least one column, or remove it")
    fields = Fields(features, spec.target, spec.sequence_length)
    if kind is SourceKind.BUILTIN:
        name = builtin_name(spec.source)
        if name == "stdlib":
            return builtin.load_stdlib(spec.args, spec.sequence_length, spec.test_fraction)
        if spec.sequence_length is not None:
            raise unusable(f"data.sequence_length is for text, and {spec.source} is a table", "remove it")
        return builtin.load_table(name, spec.args, spec.test_fraction)
    if kind is SourceKind.FUNCTION:
        entry = entry_point(spec.source)
        if code_dir is None or entry is None:
            raise unusable(f"the code of data source {spec.source} is not on this machine", "submit the job again")
        train, test, content = function.load(spec.source, code_dir, entry, spec.args, fields)
        if test is not None and spec.test_fraction is not None:
            raise unusable(f"{spec.source} returns a test split of its own", "remove test_fraction")
        return train, test, content
    if path is None:
        raise unusable(f"data {spec.source} are not on this machine", "submit the job again")
    rows = files.load(path, spec.source, kind, fields)
    return rows, None, digest or files.digest_of(path)


def _digest(content: str, spec: DataSpec) -> str:
    """Of the content and of what in the spec decides which rows there are: equal digests mean equal sample orders."""
    parts = [content, spec.test_fraction, spec.sequence_length, spec.args]
    return blake3.blake3(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _check_tokens(spec: DataSpec, train: Rows) -> None:
    dtypes = train.feature_dtypes
    kinds = list(dtypes.values()) if isinstance(dtypes, Mapping) else [dtypes]
    if not any(kind.startswith("int") for kind in kinds):
        found = ", ".join(sorted(set(kinds)))
        raise unusable(
            f"{spec.source}: loss causal_lm learns sequences of tokens, and the features are {found}",
            "give a text, or token numbers as int32 or int64, or choose another train.loss",
        )


def _same_rows(spec: DataSpec, train: Rows, test: Rows) -> None:
    if test.feature_shapes != train.feature_shapes:
        raise unusable(
            f"{spec.test}: a row has the shape {test.feature_shapes}, in {spec.source} it is {train.feature_shapes}",
            "train and test data must have the same columns",
        )
    if (train.target is None) != (test.target is None):
        raise unusable(f"only one of {spec.source} and {spec.test} has a target", "name it in data.target")


def _test_coding(coding: TargetCoding | None, spec: DataSpec, test: Rows) -> TargetCoding | None:
    """The coding of the training targets, for errors that name the test file."""
    if coding is None or test.target is None or spec.test is None:
        return coding
    found = test.target
    text = found.kind is TargetKind.TEXT or found.labels is not None
    broken = coding.labels and not coding.class_names and found.kind is TargetKind.NUMBER and not found.integral
    if broken or (coding.class_names and not text) or (found.shape or (1,)) != (coding.shape or (1,)):
        raise unusable(
            f"{spec.test}: target {found.name!r} holds another kind of values than in {spec.source}",
            "train and test targets must both be labels or both be numbers",
        )
    return replace(coding, where=spec.test)
