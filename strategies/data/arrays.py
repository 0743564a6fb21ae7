"""Rows of named arrays: npz files, builtin datasets and what user functions return.

Arrays mapped from a file are gathered as bytes: numpy would copy a whole array that is not aligned, and members of a
zip file hardly ever are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import blake3
import numpy as np

from strategies.data.dataset import WINDOW_BLOCKS, Array, Features, Indices, block_rows_for
from strategies.data.rows import Fields, row_bytes
from strategies.data.source import unknown_name, unusable
from strategies.data.target import TargetScan, TargetSummary

FEATURE_NAMES = ("x", "X", "features", "data", "inputs")
TARGET_NAMES = ("y", "target", "targets", "label", "labels")


class ArrayRows:
    """`arrays` share their first axis. features: a name, several (a dict per batch), or None for the usual names."""

    keep = True

    def __init__(self, where: str, arrays: Mapping[str, Array], fields: Fields) -> None:
        self.fields = resolve(where, tuple(arrays), fields)
        chosen = self.fields.features
        assert chosen is not None
        single = isinstance(chosen, str)
        features = {name: arrays[name] for name in ((chosen,) if isinstance(chosen, str) else chosen)}
        target = None if self.fields.target is None else arrays[self.fields.target]
        self.rows = _rows(where, features, self.fields.target, target)
        dtypes = {name: feature_dtype(f"{where}: array {name!r}", array.dtype) for name, array in features.items()}
        self._dtypes = dtypes
        self._features = {name: _Gather(array) for name, array in features.items()}
        self._single = next(iter(features)) if single else None
        self._target = None if target is None else _Gather(target)
        shapes = {name: array.shape[1:] for name, array in features.items()}
        self.feature_shapes = shapes[self._single] if self._single else shapes
        self.feature_dtypes = dtypes[self._single] if self._single else dtypes
        self.target = None if target is None else _summary(where, self.fields.target or "", target)
        self.block_rows = block_rows_for(row_bytes(self))
        self.window_blocks = WINDOW_BLOCKS

    def gather(self, indices: Indices) -> tuple[Features, Array | None]:
        target = None if self._target is None else self._target.take(indices)
        if self._single:
            return self._feature(self._single, indices), target
        return {name: self._feature(name, indices) for name in self._features}, target

    def _feature(self, name: str, indices: Indices) -> Array:
        return self._features[name].take(indices).astype(self._dtypes[name], copy=False)


class _Gather:
    """Rows of one array by index, whatever its alignment and order."""

    def __init__(self, array: Array) -> None:
        self._dtype, self._shape = array.dtype, array.shape[1:]
        plain = np.asarray(array)  # a memmap as a plain view: its subclass costs microseconds per call
        self._bytes: Array | None = None
        if not plain.flags.aligned and plain.flags.c_contiguous and plain.size:
            self._bytes = plain.view(np.uint8).reshape(len(plain), -1) if plain.ndim > 1 else _bytes_of_vector(plain)
        self._array = plain

    def take(self, indices: Indices) -> Array:
        if self._bytes is not None:
            return self._bytes.take(indices, axis=0).view(self._dtype).reshape(len(indices), *self._shape)
        if self._array.flags.c_contiguous and self._array.flags.aligned:
            return self._array.take(indices, axis=0)
        return np.ascontiguousarray(self._array[indices])


def _bytes_of_vector(array: Array) -> Array:
    return array.view(np.uint8).reshape(len(array), array.dtype.itemsize)


def resolve(where: str, names: tuple[str, ...], fields: Fields) -> Fields:
    """The arrays to use, by name. Raises SpecError with the nearest names there are."""
    wanted = (fields.features,) if isinstance(fields.features, str) else fields.features or ()
    for name in (*wanted, *((fields.target,) if fields.target is not None else ())):
        if name not in names:
            raise unknown_name(where, "array", name, names)
    target = fields.target or next((name for name in TARGET_NAMES if name in names and name not in wanted), None)
    if fields.features is not None:
        return Fields(fields.features, target)
    rest = [name for name in names if name != target]
    usual = [name for name in FEATURE_NAMES if name in rest]
    if usual or len(rest) == 1:
        return Fields((usual or rest)[0], target)
    shown = ", ".join(repr(name) for name in names) or "none"
    raise unusable(f"{where}: which of its arrays are the features?", f"set data.features; there is: {shown}")


def feature_dtype(where: str, dtype: np.dtype[Any]) -> str:
    """float32 for floats, bytes (pixels, unscaled) and booleans; int64 for larger whole numbers (token ids)."""
    if dtype.kind == "f" or dtype == np.uint8 or dtype.kind == "b":
        return "float32"
    if dtype.kind in "iu":
        return "int64"
    raise unusable(f"{where} holds {dtype}, not numbers", "features must be integers or floats")


def digest_arrays(arrays: Mapping[str, Array]) -> str:
    """Of names, types, shapes and bytes."""
    hasher = blake3.blake3()
    for name, array in sorted(arrays.items()):
        hasher.update(f"{name}\0{array.dtype.str}\0{array.shape}\n".encode())
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def _rows(where: str, features: Mapping[str, Array], target_name: str | None, target: Array | None) -> int:
    lengths = {name: array.shape[0] if array.ndim else -1 for name, array in features.items()}
    if target_name is not None and target is not None:
        lengths[target_name] = target.shape[0] if target.ndim else -1
    if -1 in lengths.values() or len(set(lengths.values())) != 1:
        shown = ", ".join(f"{name!r} {length if length >= 0 else 'no'} rows" for name, length in lengths.items())
        raise unusable(f"{where}: features and target differ in length: {shown}", "give one target for each row")
    return next(iter(lengths.values()))


def _summary(where: str, name: str, target: Array) -> TargetSummary:
    if target.dtype.kind not in "biufU":
        raise unusable(f"{where}: target {name!r} holds {target.dtype}", "targets must be numbers or text labels")
    scan = TargetScan(where, name)
    step = block_rows_for(target[:1].nbytes)
    for start in range(0, len(target), step):
        scan.add(target[start : start + step], start)
    return scan.summary()
