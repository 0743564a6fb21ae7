"""What a source is by name: kinds, the files a client ships, and combinations that are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from protos.errors import ErrorCode, SpecError
from protos.jobspec import DataSpec
from strategies.data import source
from strategies.data.source import SourceKind, check, data_file, kind_of
from strategies.data.source import test_file as split_file


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train.npz", SourceKind.NPZ),
        ("a/b/Train.CSV", SourceKind.CSV),
        ("rows.tsv", SourceKind.CSV),
        ("x.parquet", SourceKind.PARQUET),
        ("x.jsonl", SourceKind.JSONL),
        ("book.txt", SourceKind.TEXT),
        ("folder", SourceKind.PATH),
        ("folder.d/", SourceKind.PATH),
        ("builtin:digits", SourceKind.BUILTIN),
        ("data.py:build", SourceKind.FUNCTION),
        ("sub/data.py:build", SourceKind.FUNCTION),
    ],
)
def test_a_source_has_the_kind_its_name_says(name: str, kind: SourceKind) -> None:
    assert kind_of(name) is kind


@pytest.mark.parametrize(
    ("name", "said", "code"),
    [
        ("builtin:digit", "nearest: 'digits'", ErrorCode.DATA_UNUSABLE),
        ("private:scans", "federated", ErrorCode.UNSUPPORTED),
        ("data.py", "names no function", ErrorCode.DATA_UNUSABLE),
        ("", "empty", ErrorCode.DATA_UNUSABLE),
    ],
)
def test_a_source_that_cannot_be_one_says_why(name: str, said: str, code: ErrorCode) -> None:
    with pytest.raises(SpecError) as error:
        kind_of(name)
    assert said in error.value.message
    assert error.value.code is code
    assert error.value.hint


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"source": "a.csv", "test": "b.csv", "test_fraction": 0.1}, "both given"),
        ({"source": "builtin:iris", "test": "b.csv"}, "data.test"),
        ({"source": "data.py:fn", "test": "b.csv"}, "data.test"),
        ({"source": "a.csv", "test": "builtin:iris"}, "data.test"),
        ({"source": "builtin:digits", "args": {"imag": True}}, "nearest: 'image'"),
        ({"source": "builtin:iris", "target": "y"}, "no columns"),
        ({"source": "a.csv", "args": {"k": 1}}, "data.args"),
    ],
)
def test_a_field_that_would_be_ignored_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as error:
        check(DataSpec(**fields))
    assert said in error.value.message


def test_only_local_files_are_shipped(tmp_path: Path) -> None:
    spec = DataSpec(source="train.npz", test="more/test.npz")
    assert data_file(spec, tmp_path) == tmp_path / "train.npz"
    assert split_file(spec, tmp_path) == tmp_path / "more/test.npz"
    assert data_file(DataSpec(source="builtin:digits"), tmp_path) is None
    assert data_file(DataSpec(source="data.py:fn"), tmp_path) is None
    assert split_file(DataSpec(source="a.csv"), tmp_path) is None
    assert data_file(DataSpec(source="/data/shared.csv"), tmp_path) == Path("/data/shared.csv")


def test_naming_sources_needs_neither_numpy_nor_torch() -> None:
    code = (
        "import sys, strategies.data, strategies.data.source; "
        "sys.exit(any(name in sys.modules for name in ('numpy', 'torch', 'pyarrow', 'sklearn')))"
    )
    root = Path(source.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=False).returncode == 0


def test_reading_data_needs_no_torch() -> None:
    code = "import sys, strategies.data.opening; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    root = Path(source.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=False).returncode == 0
