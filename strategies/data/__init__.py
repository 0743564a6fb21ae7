"""Datasets of a job: `open_splits` and `open_dataset` give rows by index from every source a DataSpec may name.

Importing this package costs nothing: `strategies.data.source` is used by clients that have no need of numpy, so the
names below are loaded when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from strategies.data.dataset import Batch, Dataset, epoch_order
    from strategies.data.opening import Splits, open_dataset, open_splits

__all__ = ["Batch", "Dataset", "Splits", "epoch_order", "open_dataset", "open_splits"]


def __getattr__(name: str) -> object:
    if name in ("Batch", "Dataset", "epoch_order"):
        from strategies.data import dataset

        return getattr(dataset, name)
    if name in ("Splits", "open_dataset", "open_splits"):
        from strategies.data import opening

        return getattr(opening, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
