"""Which kind of model a directory is, by the names in it, and who reads it.

To add a kind: a line in READERS, and in folder.py the files that it needs opened; its reader takes a Folder and follows
the rules of parse.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.identify import hugging_face_folder, onnx_file, saved_model
from coordinator.identify.folder import Folder
from coordinator.identify.tensors import WHAT_HIVE_TRAINS, complexity_told, foreign, unusable
from protos.model import ModelProfile

_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class FolderReader:
    """`matches` is shown the names of all files that were seen."""

    name: str
    matches: Callable[[frozenset[str]], bool]
    read: Callable[[Folder], ModelProfile]


READERS: tuple[FolderReader, ...] = (  # the first that matches reads
    FolderReader("saved_model", saved_model.matches, saved_model.read),
    FolderReader("hugging_face", hugging_face_folder.matches, hugging_face_folder.read),
    FolderReader("onnx", onnx_file.is_folder, onnx_file.read_folder),
)


def identify(folder: Folder) -> ModelProfile:
    """The profile of a directory; of format "unknown" when no reader knows it. Raises SpecError."""
    if not folder.sizes:
        raise unusable("the directory holds no files", "is it the right one? Directories in it are not looked into")
    names = frozenset(folder.sizes)
    for reader in READERS:
        if reader.matches(names):
            return complexity_told(reader.read(folder))
    seen = ", ".join(ascii(name)[1:-1][:80] for name in sorted(names)[:_NAMES_SHOWN])
    why_not = f"no directory of a model hive knows. Name the file in it that is the model. {WHAT_HIVE_TRAINS}"
    notes = (f"{len(names)} files: {seen}",)
    return complexity_told(foreign("unknown", "unknown", folder.total_bytes, why_not, notes=notes))
