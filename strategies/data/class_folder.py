"""A folder with one sub-folder per class, each holding .npy arrays: every array is one row, its folder the label.

Rows of the classes are interleaved evenly, so that the last rows (test_fraction) hold all classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from strategies.data.arrays import feature_dtype
from strategies.data.dataset import IN_MEMORY_BYTES, WINDOW_BLOCKS, Array, Indices, block_rows_for
from strategies.data.rows import Fields
from strategies.data.source import unusable
from strategies.data.target import TargetScan


class ClassFolderRows:
    def __init__(self, where: str, classes: Mapping[str, Sequence[Path]]) -> None:
        placed = [
            ((number + 0.5) / len(paths), name, path)
            for name, paths in classes.items()
            for number, path in enumerate(paths)
        ]
        placed.sort()
        self._where = where
        self._paths = [path for _, _, path in placed]
        self._labels = np.empty(len(placed), dtype=object)
        self._labels[:] = [name for _, name, _ in placed]
        self.rows = len(placed)
        self.fields = Fields(None, None)
        first = self._load(0)
        self.feature_shapes = first.shape
        self.feature_dtypes = feature_dtype(f"{where}: {self._paths[0].name}", first.dtype)
        scan = TargetScan(where, "folder")
        scan.add(self._labels, 0)
        self.target = scan.summary()
        self.block_rows = block_rows_for(first.nbytes)
        self.window_blocks = WINDOW_BLOCKS
        self.keep = sum(path.stat().st_size for path in self._paths) < IN_MEMORY_BYTES

    def _load(self, row: int) -> Array:
        path = self._paths[row]
        name = f"{self._where}: {path.parent.name}/{path.name}"
        try:
            array: Array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise unusable(f"{name}: not a readable .npy array: {error}", "write it with numpy.save") from None
        if not isinstance(array, np.ndarray):
            raise unusable(f"{name}: an archive, not one array", "write it with numpy.save")
        return array

    def gather(self, indices: Indices) -> tuple[Array, Array]:
        features = np.empty((len(indices), *self.feature_shapes), dtype=self.feature_dtypes)
        for place, row in enumerate(indices.tolist()):
            array = self._load(row)
            if array.shape != self.feature_shapes or array.dtype.kind not in "biuf":
                path = self._paths[row]
                raise unusable(
                    f"{self._where}: {path.parent.name}/{path.name} is {list(array.shape)} of {array.dtype}, "
                    f"{self._paths[0].parent.name}/{self._paths[0].name} is {list(self.feature_shapes)}",
                    "all arrays must have one shape",
                )
            features[place] = array
        return features, self._labels[indices]
