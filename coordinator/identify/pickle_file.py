"""A plain pickle: whose object it is, told from the walk, and the reader that knows such objects."""

from __future__ import annotations

import re
from typing import BinaryIO

from coordinator.identify import sklearn_file
from coordinator.identify.pickle_walk import Walked, walk
from coordinator.identify.pytorch_file import pickled_objects
from coordinator.identify.tensors import WHAT_HIVE_TRAINS, foreign
from protos.model import ModelProfile

_TEXT = re.compile(rb"c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n|\((?:dp|lp|i)\d*|[}\]]q.", re.DOTALL)  # protocols 0 and 1


def looks_like(head: bytes, size: int) -> bool:
    """A pickle of any protocol; those before 2 have no magic number, only a usual beginning."""
    return (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")) or _TEXT.match(head) is not None


def read(file: BinaryIO, size: int) -> ModelProfile:
    file.seek(0)
    return profile(walk(file), "sklearn_pickle", size)


def profile(walked: Walked, file_format: str, size: int) -> ModelProfile:
    """The profile of an object that pickle or joblib wrote. Raises SpecError."""
    if "joblib.numpy_pickle.NumpyArrayWrapper" in walked.foreign:
        file_format = "joblib"
    if sklearn_file.is_estimator(walked.value):
        return sklearn_file.profile(walked, file_format, size)
    if walked.foreign:
        return pickled_objects(walked, size)
    why_not = "a plain pickle, not a file torch.save wrote; " + WHAT_HIVE_TRAINS
    return foreign("python", "pickle", size, why_not)
