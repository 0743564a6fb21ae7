"""builtin: datasets. scikit-learn's small ones, with a fixed split, and the source of Python's standard library.

Scaling uses exactly rounded sums (math.fsum), so that unlike machines get the same bytes and the same digest.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from strategies.data.arrays import ArrayRows, digest_arrays
from strategies.data.dataset import Array
from strategies.data.rows import Fields, RowRange, Rows
from strategies.data.source import unusable
from strategies.data.text import text_rows
from strategies.sample_order import permutation

TABLE_TEST_FRACTION = 0.2
TEXT_TEST_FRACTION = 0.1


def load_table(name: str, args: Mapping[str, Any], test_fraction: float | None) -> tuple[Rows, Rows, str]:
    """(train, test, digest). Features float32: digits divided by 16, the others standardised by the training rows."""
    x, y = _raw(name)
    shuffled = permutation(len(x), f"builtin:{name}")
    test_rows = min(len(x) - 1, max(1, round(len(x) * (test_fraction or TABLE_TEST_FRACTION))))
    x, y = x[shuffled], y[shuffled]
    train_rows = len(x) - test_rows
    if name == "digits":
        x = x / 16.0
        image = args.get("image", False)
        if not isinstance(image, bool):
            raise unusable(f"builtin:digits: image is {image!r}", "use image: true or image: false")
        x = x.reshape(-1, 1, 8, 8) if image else x
    else:
        x = _standardised(x, train_rows)
    arrays = {"x": x.astype(np.float32), "y": y.astype(np.float32 if y.dtype.kind == "f" else np.int64)}
    rows = ArrayRows(f"builtin:{name}", arrays, Fields("x", "y"))
    return RowRange(rows, 0, train_rows), RowRange(rows, train_rows, len(x)), digest_arrays(arrays)


def load_stdlib(
    args: Mapping[str, Any], sequence_length: int | None, test_fraction: float | None
) -> tuple[Rows, Rows, str]:
    """(train, test, digest) of the .py files of this Python's standard library, in the order of their names."""
    limit = args.get("limit_bytes")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise unusable(f"builtin:stdlib: limit_bytes is {limit!r}", "use a whole number of bytes")
    content = _stdlib(limit)
    rows = text_rows("builtin:stdlib", content, sequence_length)
    test_rows = max(1, round(rows.rows * (test_fraction or TEXT_TEST_FRACTION)))
    if test_rows >= rows.rows:
        raise unusable("builtin:stdlib: too little text for a test split", "raise limit_bytes")
    train_rows = rows.rows - test_rows
    digest = digest_arrays({"text": np.frombuffer(content, dtype=np.uint8)})
    return RowRange(rows, 0, train_rows), RowRange(rows, train_rows, rows.rows), digest


def _raw(name: str) -> tuple[Array, Array]:
    """As scikit-learn gives it. digits is read from its file: importing scikit-learn takes a second, this 30 ms."""
    package = importlib.util.find_spec("sklearn")
    for location in (package.submodule_search_locations or ()) if package is not None else ():
        file = Path(location) / "datasets" / "data" / "digits.csv.gz"
        if name == "digits" and file.is_file():
            with gzip.open(file, "rb") as content:
                table = np.array(content.read().replace(b"\n", b",").rstrip(b",").split(b","), dtype=np.float64)
            table = table.reshape(-1, 65)
            return table[:, :64], table[:, 64].astype(np.int64)
    try:
        from sklearn import datasets
    except ImportError:
        raise unusable(
            f"builtin:{name} needs scikit-learn on the node", "install scikit-learn there, or use builtin:stdlib"
        ) from None
    if name == "diabetes":
        x, y = datasets.load_diabetes(return_X_y=True, scaled=False)
    else:
        x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return np.asarray(x, dtype=np.float64), np.asarray(y)


def _standardised(x: Array, train_rows: int) -> Array:
    out = np.empty_like(x)
    for column in range(x.shape[1]):
        values = x[:train_rows, column].tolist()
        mean = math.fsum(values) / train_rows
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / train_rows)
        out[:, column] = (x[:, column] - mean) / (deviation or 1.0)
    return out


def _stdlib(limit_bytes: int | None) -> bytes:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    parts: list[bytes] = []
    size = 0
    for path in sorted((path for path in paths if not skipped & set(path.parts)), key=lambda path: path.as_posix()):
        part = (root / path).read_bytes()
        parts.append(part)
        size += len(part)
        if limit_bytes is not None and size >= limit_bytes:
            break
    return b"".join(parts)[:limit_bytes]
