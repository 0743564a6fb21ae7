"""Which kind of zip archive it is, by the names of its entries, and who reads it.

To add a kind: a line in READERS; its reader takes an Archive and follows the rules of parse.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from coordinator.identify import (
    exported_program,
    keras_file,
    numpy_file,
    pytorch_file,
    skops_file,
    torchscript_file,
)
from coordinator.identify.archive import Archive, open_archive
from coordinator.identify.tensors import WHAT_HIVE_TRAINS, foreign
from protos.model import ModelProfile


@dataclass(frozen=True, slots=True)
class ArchiveReader:
    """`matches` is shown Archive.leaves."""

    name: str
    matches: Callable[[frozenset[str]], bool]
    read: Callable[[Archive], ModelProfile]


def _named(framework: str, file_format: str, why_not: str) -> Callable[[Archive], ModelProfile]:
    """A kind that is named and not read."""
    return lambda archive: foreign(framework, file_format, archive.size, why_not)


_ZIP = f"a zip archive without a PyTorch data.pkl; {WHAT_HIVE_TRAINS}"

READERS: tuple[ArchiveReader, ...] = (  # the first that matches reads
    ArchiveReader("torchscript", torchscript_file.matches, torchscript_file.read),
    ArchiveReader("pytorch_export", exported_program.matches, exported_program.read),
    ArchiveReader("keras", keras_file.matches, keras_file.read_archive),
    ArchiveReader("skops", skops_file.matches, skops_file.read),
    ArchiveReader("npz", numpy_file.is_npz, numpy_file.read_npz),
    ArchiveReader("pytorch_zip", lambda names: "data.pkl" in names, pytorch_file.identify_archive),
    ArchiveReader("zip", lambda names: True, _named("unknown", "zip", _ZIP)),
)


def read(file: BinaryIO, size: int) -> ModelProfile:
    """The profile of a zip archive of any kind. Raises SpecError for damaged or hostile ones."""
    archive = open_archive(file, size)
    for reader in READERS:
        if reader.matches(archive.leaves):
            return reader.read(archive)
    raise AssertionError("the last reader matches everything")
