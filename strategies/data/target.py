"""Targets: what the values of a target column are over a whole source, and how they become numbers.

Pure. Text becomes labels by sorted order over the whole source; whole numbers stay labels (int64) unless the loss wants
values; other numbers become float32, and a scalar one gets the shape [n, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np

from strategies.data.dataset import Array, Indices, Shape
from strategies.data.source import unusable

MAX_TEXT_LABELS = 10_000
_LABEL_LOSSES = ("cross_entropy", "causal_lm")
_VALUE_LOSSES = ("mse", "l1", "bce_with_logits")


class TargetKind(IntEnum):
    INTEGER = 0
    NUMBER = 1
    TEXT = 2


@dataclass(frozen=True, slots=True)
class TargetSummary:
    """`labels`: every distinct text cell, None where there are too many or the values were never text."""

    name: str
    kind: TargetKind
    integral: bool  # every value is a whole number
    minimum: float
    maximum: float
    shape: Shape = ()
    labels: frozenset[str] | None = None
    bounded: bool = True  # False: not every row was looked at, so the largest label is unknown

    def merged(self, other: TargetSummary) -> TargetSummary:
        both = self.labels is not None and other.labels is not None
        labels = (self.labels or frozenset()) | (other.labels or frozenset()) if both else None
        return replace(
            self,
            kind=max(self.kind, other.kind),
            integral=self.integral and other.integral,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            labels=labels if labels is None or len(labels) <= MAX_TEXT_LABELS else None,
            bounded=self.bounded and other.bounded,
        )


class TargetScan:
    """Builds a TargetSummary from the values of a column, given in pieces: numbers, or cells of text."""

    def __init__(self, where: str, name: str) -> None:
        self._where = where
        self._name = name
        self._shape: Shape | None = None
        self._kind = TargetKind.INTEGER
        self._integral = True
        self._minimum = float("inf")
        self._maximum = float("-inf")
        self._labels: set[str] | None = None
        self._many = False

    def add(self, values: Array, first_row: int) -> None:
        """Raises SpecError for an empty cell; `first_row` counts from 0."""
        if self._shape is None:
            self._shape = values.shape[1:]
        if values.dtype.kind in "OUT":
            self._cells(values.tolist(), first_row)
        elif values.dtype.kind in "biu":
            if values.size:
                self._extent(float(values.min()), float(values.max()))
        else:
            self._numbers(values)

    def _cells(self, cells: list[str], first_row: int) -> None:
        new = set(cells)
        if "" in new:
            raise unusable(
                f"{self._where}: row {first_row + cells.index('') + 1}: {self._name!r} is empty",
                "every row needs a target: fill it in or remove the row",
            )
        if self._labels is None:
            self._labels = set()
        if not self._many:
            new -= self._labels
            self._labels |= new
            self._many = len(self._labels) > MAX_TEXT_LABELS
        elif self._kind is not TargetKind.TEXT:
            self._labels.clear()
        for cell in new:
            value = _number(cell)
            if value is None:
                self._kind = TargetKind.TEXT
            else:
                self._numbers(np.asarray(value))

    def _numbers(self, values: Array) -> None:
        if values.dtype.kind in "biu":
            self._extent(float(values.min()), float(values.max()))
            return
        self._kind = max(self._kind, TargetKind.NUMBER)
        finite = values[np.isfinite(values)]
        self._integral = self._integral and finite.size == values.size and bool(np.all(finite == np.floor(finite)))
        if finite.size:
            self._extent(float(finite.min()), float(finite.max()))

    def _extent(self, low: float, high: float) -> None:
        self._minimum = min(self._minimum, low)
        self._maximum = max(self._maximum, high)

    def summary(self) -> TargetSummary:
        labels = frozenset(self._labels) if self._labels is not None and not self._many else None
        return TargetSummary(
            self._name, self._kind, self._integral, self._minimum, self._maximum, self._shape or (), labels
        )


@dataclass(frozen=True, slots=True)
class TargetCoding:
    """How raw target values become the array a loss is given."""

    where: str
    name: str
    labels: bool  # int64 labels rather than float32 values
    shape: Shape
    classes: int | None
    class_names: tuple[str, ...] = ()
    index: Mapping[str, int] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return "int64" if self.labels else "float32"

    def encode(self, raw: Array, rows: Indices) -> Array:
        """Raises SpecError naming the row of a value that was not in the source the coding was made from."""
        values = self._parse(raw, rows) if raw.dtype.kind in "OUT" else raw
        if self.labels:
            return values.astype(np.int64, copy=False)
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float32, copy=False)
        if values.dtype == np.float64 and (lost := np.isinf(narrow) & np.isfinite(values)).any():
            at = np.argwhere(lost)[0]
            raise unusable(
                f"{self.where}: row {int(rows[at[0]]) + 1}: {self.name!r} is {values[tuple(at)]:g}, over the "
                f"{np.finfo(np.float32).max:.2g} that 32 bits hold",
                "scale the target, or correct the value",
            )
        return narrow[:, None] if narrow.ndim == 1 else narrow

    def _parse(self, raw: Array, rows: Indices) -> Array:
        decoded: list[float] = []
        for position, cell in enumerate(raw.tolist()):
            value = self.index.get(cell) if self.class_names else _number(cell)
            if value is None:
                raise self._unknown(str(cell), int(rows[position]) + 1)
            decoded.append(value)
        return np.asarray(decoded, dtype=np.int64 if self.labels else np.float64)

    def _unknown(self, cell: str, row: int) -> Exception:
        what = "is not among the labels of the training data" if self.class_names else "is not a number"
        known = ", ".join(self.class_names[:20]) + (" ..." if len(self.class_names) > 20 else "")
        return unusable(
            f"{self.where}: row {row}: {self.name!r} is {cell[:80]!r}, which {what}",
            f"labels are: {known}" if known else "correct the value or remove the row",
        )


class Cells:
    """Makes arrays of text cells in which equal cells are one object, so that decoded chunks stay small."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, cells: list[str], summary: TargetSummary | None = None) -> Array:
        """The cells; as numbers already where the summary says that they are, and too many to be labels."""
        if summary is not None and summary.labels is None and summary.kind is not TargetKind.TEXT:
            dtype = np.int64 if summary.kind is TargetKind.INTEGER else np.float64
            return np.fromiter((_number(cell) for cell in cells), dtype=dtype, count=len(cells))
        if len(self._known) > MAX_TEXT_LABELS:
            self._known.clear()
        out = np.empty(len(cells), dtype=object)
        out[:] = [self._known.setdefault(cell, cell) for cell in cells]
        return out


def plan_coding(summary: TargetSummary, loss: str, where: str) -> TargetCoding:
    """The coding for a loss: labels for cross_entropy and causal_lm, values for mse, l1 and bce_with_logits."""
    integers = summary.kind is TargetKind.INTEGER
    labels = integers or summary.kind is TargetKind.TEXT
    if loss in _VALUE_LOSSES:
        labels = False
    elif loss in _LABEL_LOSSES and not summary.shape:
        if summary.kind is TargetKind.NUMBER and not summary.integral and summary.bounded:
            raise unusable(
                f"{where}: target {summary.name!r} holds numbers that are not whole, and {loss} needs labels",
                "use loss: mse for numbers, or a column of labels",
            )
        labels = True
        if summary.kind is not TargetKind.TEXT and summary.bounded and summary.minimum < 0:
            raise unusable(
                f"{where}: target {summary.name!r} has the label {summary.minimum:g}, and labels count from 0",
                "number the classes 0, 1, 2 ...",
            )
    shape = summary.shape if labels or summary.shape else (1,)
    if summary.kind is not TargetKind.TEXT:
        known = labels and summary.bounded and 0 <= summary.minimum <= summary.maximum
        return TargetCoding(where, summary.name, labels, shape, int(summary.maximum) + 1 if known else None)
    if summary.labels is None:
        raise unusable(
            f"{where}: target {summary.name!r} has text with more than {MAX_TEXT_LABELS} distinct values",
            "name a column of numbers or of labels in data.target",
        )
    names = tuple(sorted(summary.labels))
    index = {name: number for number, name in enumerate(names)}
    return TargetCoding(where, summary.name, labels, shape, len(names) if labels else None, names, index)


def needs_target(loss: str) -> bool:
    return loss in _VALUE_LOSSES or loss == "cross_entropy"


def _number(cell: str | float) -> int | float | None:
    if not isinstance(cell, str):
        return cell  # a shard may have its numbers decoded already
    try:
        value = int(cell)
        return value if -(2**63) <= value < 2**63 else float(value)
    except (ValueError, OverflowError):
        pass
    try:
        return float(cell)
    except ValueError:
        return None
