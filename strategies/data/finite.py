"""Where data are not finite, looked for once a loss was not: a bad cell is not blamed on the learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from strategies.data.dataset import Array, Batch, Indices


def not_finite(batch: Batch, rows: Indices, columns: Sequence[str] = ()) -> str | None:
    """A clause that names the column and the rows of values that are infinite or not a number; None if there are none.

    `rows`: of the dataset, those of the batch. `columns`: names of a vector's parts, where they have some.
    """
    named = dict(batch.features) if isinstance(batch.features, dict) else {"": batch.features}
    if batch.target is not None:
        named["target"] = batch.target
    for name, values in named.items():
        bad = ~np.isfinite(values) if np.issubdtype(values.dtype, np.floating) else None
        if bad is not None and bad.any():
            found = rows[bad.reshape(len(bad), -1).any(axis=1)]
            first, last = int(found.min()), int(found.max())
            where = f"row {first}" if first == last else f"{len(found)} rows from {first} to {last}"
            return f"{_column(name, bad, columns)} holds values that are infinite or not a number, in {where}"
    return None


def _column(name: str, bad: Array, columns: Sequence[str]) -> str:
    if name:
        return repr(name)
    if bad.ndim != 2:
        return "the features array"
    number = int(bad.any(axis=0).argmax())
    return f"column {columns[number]!r}" if len(columns) == bad.shape[1] else f"feature column {number}"
