"""Data from a user's FILE.py:FUNCTION. Runs the user's code: only ever called in a worker process.

The function is called with data.args and may return (x, y), (x, y, x_test, y_test), a dict of named arrays, a dict with
train and test, text, or any object with __len__ and __getitem__. Arrays are anything numpy understands, or tensors (by
their .numpy()); nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import blake3
import numpy as np

from protos.artifact import digest_file
from protos.errors import Blame, SpecError
from strategies.data.arrays import ArrayRows, digest_arrays
from strategies.data.dataset import WINDOW_BLOCKS, Array, Features, Indices, block_rows_for
from strategies.data.rows import Fields, Rows
from strategies.data.source import unknown_name, unusable
from strategies.data.target import TargetKind, TargetSummary
from strategies.data.text import text_rows

RETURNS = (
    "return (x, y), (x, y, x_test, y_test), a dict of arrays, a dict with train and test, text, "
    "or an object with __len__ and __getitem__"
)
_TARGET_KEYS = ("target", "targets", "label", "labels", "y")


def load(where: str, code_dir: Path, entry: tuple[str, str], args: Mapping[str, Any], fields: Fields) -> Loaded:
    """(train, test or None, digest of what was returned)."""
    file, name = entry
    path = code_dir / file
    if not path.is_file():
        raise unusable(f"data source {where}: there is no {file} beside the job file", "correct data.source")
    module = _module(where, path, code_dir)
    function = getattr(module, name, None)
    if not callable(function):
        existing = tuple(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise unknown_name(file, "function", name, existing)
    try:
        returned = function(**args)
    except Exception as error:
        raise _raised(where, code_dir, error) from None
    seed = json.dumps([where, dict(args), digest_file(path)], sort_keys=True, default=str)
    train, test = _splits(returned)
    rows, digest = _rows(where, train, fields, seed)
    if rows is None:
        raise unusable(f"{where} returned {_kind(returned)}, which is not data", RETURNS)
    if test is None:
        return rows, None, digest
    test_rows, _ = _rows(f"{where} (test)", test, rows.fields, seed)
    if test_rows is None:
        raise unusable(f"{where} returned {_kind(test)} as its test split, which is not data", RETURNS)
    return rows, test_rows, digest


Loaded = tuple[Rows, Rows | None, str]


class MappedRows:
    """An object with __len__ and __getitem__, as torch's map-style datasets. Items: x, (x, y) or a dict of arrays.

    Items are asked for again every epoch, since they may be augmented at random; so the digest is that of the code.
    """

    keep = False

    def __init__(self, where: str, items: Any, fields: Fields) -> None:
        self._where = where
        self._items = items
        self.rows = len(items)
        if not self.rows:
            raise unusable(f"{where} has no rows", "return at least one")
        self._wanted = fields
        features, target = self._item(0)
        self.fields = fields
        self.feature_shapes = _each(features, lambda array: array.shape)
        self.feature_dtypes = _each(features, _item_dtype)
        self.target = None if target is None else _item_summary(where, target)
        self.block_rows = block_rows_for(1)
        self.window_blocks = WINDOW_BLOCKS

    def gather(self, indices: Indices) -> tuple[Features, Array | None]:
        items = [self._item(int(row)) for row in indices]
        first = items[0][0] if items else self._item(0)[0]
        features: Features
        if isinstance(first, dict):
            assert isinstance(self.feature_dtypes, dict)
            features = {
                name: self._stack([one[name] for one, _ in items if isinstance(one, dict)], indices, dtype)
                for name, dtype in self.feature_dtypes.items()
            }
        else:
            assert isinstance(self.feature_dtypes, str)
            plain = [one for one, _ in items if not isinstance(one, dict)]
            features = self._stack(plain, indices, self.feature_dtypes)
        if self.target is None:
            return features, None
        dtype = "int64" if self.target.kind is TargetKind.INTEGER else "float64"
        return features, self._stack([target for _, target in items if target is not None], indices, dtype)

    def _item(self, row: int) -> tuple[Features, Array | None]:
        try:
            item = self._items[row]
        except Exception as error:
            raise unusable(
                f"{self._where}: item {row} raised {type(error).__name__}: {error}", "correct it", blame=Blame.USER_CODE
            ) from None
        if isinstance(item, Mapping):
            name = self._wanted.target or next((key for key in _TARGET_KEYS if key in item), None)
            features: Features = {str(key): as_array(self._where, value) for key, value in item.items() if key != name}
            return features, as_array(self._where, item[name]) if name is not None and name in item else None
        if isinstance(item, (tuple, list)) and len(item) == 2:
            return as_array(self._where, item[0]), as_array(self._where, item[1])
        return as_array(self._where, item), None

    def _stack(self, arrays: list[Array], indices: Indices, dtype: str) -> Array:
        for row, array in zip(indices, arrays, strict=True):
            if array.shape != arrays[0].shape:
                raise unusable(
                    f"{self._where}: item {row} has the shape {list(array.shape)}, item {indices[0]} has "
                    f"{list(arrays[0].shape)}",
                    "all items must have one shape: pad or crop them",
                )
        return np.stack(arrays).astype(dtype, copy=False)


def as_array(where: str, value: Any) -> Array:
    """A numeric array from whatever a user returned: tensors by duck typing, else what numpy makes of it."""
    try:
        for method in ("detach", "cpu", "numpy"):
            if hasattr(value, method):
                value = getattr(value, method)()
        array = np.asarray(value)
    except Exception as error:
        raise unusable(f"{where}: {_kind(value)} is not an array: {error}", "return numbers") from None
    if array.dtype.kind not in "biufU":
        raise unusable(f"{where}: an array of {array.dtype}, not of numbers", "return numbers")
    return array


def _splits(returned: Any) -> tuple[Any, Any]:
    if isinstance(returned, tuple):
        if len(returned) == 4:
            return returned[:2], returned[2:]
        if len(returned) == 2 and all(_is_mapped(part) for part in returned):
            return returned
    if isinstance(returned, Mapping) and "train" in returned:
        return returned["train"], returned.get("test")
    return returned, None


def _rows(where: str, value: Any, fields: Fields, seed: str) -> tuple[Rows | None, str]:
    if isinstance(value, (str, bytes)):
        content = value.encode() if isinstance(value, str) else value
        return text_rows(where, content, fields.sequence_length), digest_arrays({"": np.frombuffer(content, np.uint8)})
    arrays: dict[str, Array]
    if isinstance(value, Mapping):
        arrays = {str(name): as_array(where, one) for name, one in value.items()}
    elif isinstance(value, tuple) and len(value) == 2:
        x, y = value
        if isinstance(x, Mapping):
            arrays = {str(name): as_array(where, one) for name, one in x.items()}
            fields = Fields(fields.features or tuple(arrays), "y")
        else:
            arrays = {"x": as_array(where, x)}
        arrays["y"] = as_array(where, y)
    elif _is_mapped(value) or isinstance(value, list):
        digest = blake3.blake3(f"{seed}\0{len(value)}".encode()).hexdigest()
        return MappedRows(where, value, fields), digest
    elif _is_array(value):
        arrays = {"x": as_array(where, value)}
    else:
        return None, ""
    return ArrayRows(where, arrays, fields), digest_arrays(arrays)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") or hasattr(value, "__array__")


def _is_mapped(value: Any) -> bool:
    plain = isinstance(value, (str, bytes, tuple, list, Mapping))
    return not plain and not _is_array(value) and hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _each(features: Features, of: Any) -> Any:
    return {name: of(array) for name, array in features.items()} if isinstance(features, dict) else of(features)


def _item_dtype(array: Array) -> str:
    return "float32" if array.dtype.kind in "fb" or array.dtype == np.uint8 else "int64"


def _item_summary(where: str, target: Array) -> TargetSummary:
    if target.dtype.kind == "U":
        raise unusable(f"{where}: items have text as their target", "return the number of the class")
    kind = TargetKind.NUMBER if target.dtype.kind == "f" else TargetKind.INTEGER
    return TargetSummary("target", kind, kind is TargetKind.INTEGER, 0, 0, target.shape, bounded=False)


def _module(where: str, path: Path, code_dir: Path) -> ModuleType:
    if str(code_dir) not in sys.path:
        sys.path.insert(0, str(code_dir))  # so that it can import its neighbours
    name = f"_hive_data_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _raised(where, code_dir, error) from None
    return module


def _raised(where: str, code_dir: Path, error: Exception) -> SpecError:
    """The user's exception with the lines of the user's own files it went through."""
    if isinstance(error, SpecError):
        return error
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(code_dir))]
    trail = "; ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in frames[-3:])
    at = f" at {trail}" if trail else ""
    return unusable(
        f"{where} raised {type(error).__name__}: {error}{at}",
        "correct the function and submit again",
        blame=Blame.USER_CODE,
    )


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"
