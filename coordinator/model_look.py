"""What a model is, found out in two looks: at its bytes, here and confined; and, where that adds something, by a node
that builds it. The CLI's `hive models identify`.

Owns which models a second look is worth, what travels for it (never weights that are not needed), and how both answers
are joined: what was read is believed before what was built. Neither look runs a model's code on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.identify.confine import identify_path
from protos.errors import SpecError
from protos.jobspec import ModelSpec, entry_point
from protos.model import ModelProfile
from strategies.hugging_face import INDEX_FILE

if TYPE_CHECKING:
    from coordinator.bundle import Bundle, HashProgress

_BUILT = {
    "python_source": "a node would build it: layers and parameters",
    "hugging_face": "a node would build it from its configuration: layers, FLOPs, activations",
    "pytorch_export": "a node would read the program: layers, FLOPs, activations",
}


@dataclass(frozen=True, slots=True)
class Subject:
    """`path` on this machine; `function` of it, when it is an entry point."""

    path: Path
    function: str | None = None

    @classmethod
    def of(cls, text: str) -> Subject:
        """Of PATH or FILE.py:FUNCTION; a file of that very name comes first. The index of weights in several files is
        the directory that holds them."""
        path = Path(text)
        if path.name == INDEX_FILE and path.is_file():
            return cls(path.parent)
        point = entry_point(text)
        if point is None or Path(text).exists():
            return cls(Path(text))
        return cls(Path(point[0]), point[1])


async def at_bytes(subject: Subject) -> ModelProfile:
    """Raises NotFound and SpecError as confine.identify_file."""
    profile = await identify_path(subject.path)
    if subject.function is None:
        return profile
    if profile.format != "python_source":
        raise SpecError(f"{subject.path} is {profile.format}, not Python source", "name the file alone")
    from coordinator.source_files import names_defined

    if not names_defined(subject.path) & {subject.function, "*"}:
        raise SpecError(f"{subject.path} defines no {subject.function!r}", "name a function of that file")
    return replace(profile, why_not="")


def what_a_node_adds(subject: Subject, profile: ModelProfile) -> str:
    """In words; nothing when a second look is not worth it."""
    if not profile.trainable or (profile.format == "python_source" and subject.function is None):
        return ""
    if profile.format == "hugging_face" and not subject.path.is_dir():
        return ""
    return _BUILT.get(profile.format, "")


def travelling(subject: Subject, progress: HashProgress = lambda done, total: None) -> Bundle:
    """What a node needs. Raises SpecError for code that cannot be collected."""
    from coordinator.bundle import bundle_model

    path = subject.path.resolve()
    source = f"{path.name}:{subject.function}" if subject.function else path.name
    weights = "none" if path.is_dir() else None  # a configuration is enough
    return bundle_model(ModelSpec(source=source, weights=weights), path.parent, progress)


def joined(read: ModelProfile, built: ModelProfile) -> ModelProfile:
    """Both looks as one profile: sizes and types as they are stored, layers as they were built."""
    notes = read.notes + built.notes
    if read.parameters and read.parameters != built.parameters:
        notes += (f"the files hold {read.parameters:,} parameters, the model that was built {built.parameters:,}",)
    return replace(
        built,
        framework=read.framework,
        format=read.format,
        bytes=read.bytes if read.dtypes else built.bytes,
        dtypes=read.dtypes or built.dtypes,
        task=built.task if built.task != "unknown" else read.task,
        unknown=tuple(name for name in built.unknown if name != "task" or read.task == "unknown"),
        notes=notes,
    )
