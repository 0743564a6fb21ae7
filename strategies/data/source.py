"""What a data source is, from its name alone: which files a client must ship, and which combinations are refused.

Pure: reads no file and imports no numpy, so that the CLI and the coordinator can use it.
"""

from __future__ import annotations

import difflib
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from protos.errors import ErrorCode, SpecError
from protos.jobspec import DataSpec, entry_point

BUILTINS: dict[str, tuple[str, ...]] = {  # name -> the args it takes
    "digits": ("image",),
    "iris": (),
    "wine": (),
    "breast_cancer": (),
    "diabetes": (),
    "stdlib": ("limit_bytes",),
}
MODEL_ALONE = "none:"  # of an identify task about a model without data; never of a job
FORMATS = "npz, csv, parquet, jsonl, txt, a folder of these, builtin:NAME or FILE.py:FUNCTION"


class SourceKind(StrEnum):
    NPZ = "npz"
    CSV = "csv"
    PARQUET = "parquet"
    JSONL = "jsonl"
    TEXT = "text"
    PATH = "path"  # a folder, or a file whose contents decide
    BUILTIN = "builtin"
    FUNCTION = "function"


SUFFIXES = {
    ".npz": SourceKind.NPZ,
    ".csv": SourceKind.CSV,
    ".tsv": SourceKind.CSV,
    ".parquet": SourceKind.PARQUET,
    ".pq": SourceKind.PARQUET,
    ".jsonl": SourceKind.JSONL,
    ".ndjson": SourceKind.JSONL,
    ".txt": SourceKind.TEXT,
    ".text": SourceKind.TEXT,
    ".md": SourceKind.TEXT,
}
WITHOUT_FILES = (SourceKind.BUILTIN, SourceKind.FUNCTION)


def kind_of(source: str) -> SourceKind:
    """The kind a source's name says. Raises SpecError for one that is not built or cannot be one."""
    if source.startswith("builtin:"):
        builtin_name(source)
        return SourceKind.BUILTIN
    if source.startswith("private:"):
        raise SpecError(
            f"data source {source!r}: private data need federated training, which is not built yet",
            f"use {FORMATS}",
            code=ErrorCode.UNSUPPORTED,
        )
    if source == MODEL_ALONE:
        raise unusable("a job needs data", f"use {FORMATS}")
    if entry_point(source):
        return SourceKind.FUNCTION
    suffix = PurePosixPath(source).suffix.lower()
    if suffix == ".py":
        raise unusable(f"data source {source!r} names no function", f"write {source}:FUNCTION")
    if not source or "\0" in source:
        raise unusable("data.source is empty or not a path", f"use {FORMATS}")
    return SUFFIXES.get(suffix, SourceKind.PATH)


def builtin_name(source: str) -> str:
    """ "digits" of "builtin:digits"."""
    name = source.removeprefix("builtin:")
    if name not in BUILTINS:
        raise unknown_name(f"data source {source!r}", "builtin dataset", name, tuple(BUILTINS))
    return name


def check(spec: DataSpec) -> SourceKind:
    """The kind of a spec's source, once every field of the spec means something for it."""
    kind = kind_of(spec.source)
    if spec.test is not None and spec.test_fraction is not None:
        raise unusable("data.test and data.test_fraction are both given", "keep one of them")
    if spec.test is not None and kind in WITHOUT_FILES:
        hint = "use test_fraction" if kind is SourceKind.BUILTIN else "return the test split from the function"
        raise unusable(f"data.test is for data in files, not for {spec.source}", hint)
    if spec.test is not None and kind_of(spec.test) in WITHOUT_FILES:
        raise unusable(f"data.test must be a file or a folder, not {spec.test}", "or use test_fraction")
    if kind is SourceKind.BUILTIN:
        name = builtin_name(spec.source)
        for key in spec.args:
            if key not in BUILTINS[name]:
                raise unknown_name(spec.source, "argument", key, BUILTINS[name])
        if spec.features is not None or spec.target is not None:
            raise unusable(f"{spec.source} has no columns to choose", "remove data.features and data.target")
    elif spec.args and kind is not SourceKind.FUNCTION:
        raise unusable("data.args are for FILE.py:FUNCTION and builtin: sources", "remove data.args")
    return kind


def data_file(spec: DataSpec, base: Path) -> Path | None:
    """The local file or folder a job's data live in, relative names taken from `base`; None when there is none."""
    return None if kind_of(spec.source) in WITHOUT_FILES else base / Path(spec.source).expanduser()


def test_file(spec: DataSpec, base: Path) -> Path | None:
    """The local file or folder of the test split; None when it is part of the source."""
    return None if spec.test is None else base / Path(spec.test).expanduser()


def unusable(message: str, hint: str = "", **details: Any) -> SpecError:
    """The error of data as the user gave them."""
    return SpecError(message, hint, code=ErrorCode.DATA_UNUSABLE, **details)


def unknown_name(where: str, what: str, name: str, existing: tuple[str, ...]) -> SpecError:
    """`where` has no `what` called `name`; names the nearest ones there are."""
    near = difflib.get_close_matches(name, existing, 3, 0.5)
    meant = f"; nearest: {', '.join(repr(one) for one in near)}" if near else ""
    shown = ", ".join(repr(one) for one in existing[:20]) + (" ..." if len(existing) > 20 else "")
    return unusable(f"{where}: no {what} {name[:80]!r}{meant}", f"there is: {shown or 'none'}")
