"""A plain pickle: whose object it is, told from the walk, and the reader that knows such objects."""

from __future__ import annotations

import re
from typing import BinaryIO

from coordinator.identify import sklearn_file, text_file
from coordinator.identify.pickle_harm import HarmfulPickle
from coordinator.identify.pickle_values import Array
from coordinator.identify.pickle_walk import Walked, walk
from coordinator.identify.pytorch_file import is_of_pytorch, names_of, pickled_objects
from coordinator.identify.tensors import WHAT_HIVE_TRAINS, foreign
from protos.errors import SpecError
from protos.model import ModelProfile

_HEAD_BYTES = 4096
_ARRAY = "an array without a model: save it with numpy.save and use it as data.source. "
_OBJECTS = "a pickle of objects ({what}) that are no model hive knows, and loading one runs code: hive never does. "
_TEXT = re.compile(rb"c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n|\((?:dp|lp|i)\d*|[}\]]q.", re.DOTALL)  # protocols 0 and 1


def looks_like(head: bytes, size: int) -> bool:
    """A pickle of any protocol; those before 2 have no magic number, only a usual beginning."""
    return (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")) or _TEXT.match(head) is not None


def read(file: BinaryIO, size: int) -> ModelProfile:
    """Text that only begins like a pickle without a magic number is text; raises SpecError for other damaged ones."""
    file.seek(0)
    try:
        walked = walk(file)
    except HarmfulPickle:
        raise
    except SpecError:
        file.seek(0)
        if (head := file.read(_HEAD_BYTES))[:1] == b"\x80" or not text_file.looks_like(head, size):
            raise
        return text_file.read(file, size)
    return profile(walked, "pickle", size)


def refuse_harmful(stream: BinaryIO) -> None:
    """Raises SpecError when bytes that no reader knows are a pickle all the same, and one that is harmful to load."""
    try:
        walk(stream)
    except HarmfulPickle:
        raise
    except SpecError:
        return


def profile(walked: Walked, file_format: str, size: int) -> ModelProfile:
    """The profile of an object that pickle or joblib wrote, which is the `file_format`. Raises SpecError."""
    if "joblib.numpy_pickle.NumpyArrayWrapper" in walked.foreign:
        file_format = "joblib"
    if sklearn_file.is_estimator(walked.value):
        return sklearn_file.profile(walked, "sklearn_pickle" if file_format == "pickle" else file_format, size)
    if is_of_pytorch(walked):
        return pickled_objects(walked, size)
    what = names_of(walked.foreign.values())
    if isinstance(walked.value, Array) and walked.value.dtype is not None and walked.value.objects is None:
        seen = f"a numpy array, {walked.value.dtype.name}[{', '.join(map(str, walked.value.shape))}]"
        return foreign("unknown", file_format, size, _ARRAY + WHAT_HIVE_TRAINS, notes=(seen,))
    why_not = _OBJECTS.format(what=what) if what else "a plain pickle, not a file torch.save wrote; "
    return foreign("unknown", file_format, size, why_not + WHAT_HIVE_TRAINS)
