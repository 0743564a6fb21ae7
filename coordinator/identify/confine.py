"""Starts the confined child that reads a model, and turns its answer, or its death, into a profile or an error.

Invariants: what is read is opened here, once, and only regular files; the child gets those descriptors, an empty
environment and a deadline; whatever happens to it, the caller sees a ModelProfile or a HiveError.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.confined import answer_of
from coordinator.identify.open_folder import OpenFolder, open_folder, open_named
from coordinator.identify.parse import WEIGHT_FORMATS
from coordinator.identify.tensors import unusable
from protos import documents
from protos.errors import HiveError, NotFound, SpecError, from_document
from protos.model import ModelProfile

DEADLINE_S = 30.0
MAX_ANSWER_BYTES = 4 * 1024 * 1024
_TOO_MUCH = "the file asks for more memory or time than a model file may; write it again, e.g. as safetensors"


def usable_as_weights(profile: ModelProfile) -> bool:
    """True when the file may be model.weights beside an entry point."""
    return profile.format in WEIGHT_FORMATS


async def identify_path(path: Path, *, deadline_s: float = DEADLINE_S) -> ModelProfile:
    """What kind of model the file or directory at `path` is; raises as identify_file."""
    return await (identify_folder if path.is_dir() else identify_file)(path, deadline_s=deadline_s)


async def identify_file(path: Path, *, deadline_s: float = DEADLINE_S) -> ModelProfile:
    """What kind of model the file at `path` is, without running it.

    Raises NotFound when there is no such file, SpecError (MODEL_UNUSABLE) when it is a directory, a device, empty,
    damaged or hostile. A file that is recognised but cannot be trained comes back with `why_not`; one that nobody knows
    has the format "unknown".
    """
    descriptor = open_regular(path)
    try:
        return await _identified(path.name, _Handed("file", stdin=descriptor), deadline_s)
    finally:
        os.close(descriptor)


async def identify_folder(path: Path, *, deadline_s: float = DEADLINE_S) -> ModelProfile:
    """What kind of model the directory at `path` is; raises as identify_file."""
    with open_folder(path) as opened:
        return await _identified(path.resolve().name, _handed(opened), deadline_s)


async def identify_files(name: str, files: Mapping[str, Path], *, deadline_s: float = DEADLINE_S) -> ModelProfile:
    """The same of a directory whose files lie elsewhere: by the names that they have in it."""
    with open_named(files) as opened:
        return await _identified(name, _handed(opened), deadline_s)


async def bounds_held(deadline_s: float = DEADLINE_S) -> Mapping[str, bool]:
    """Which bounds the child that reads strangers' files has on this machine."""
    try:
        answer = await _run(_Handed("bounds", stdin=asyncio.subprocess.DEVNULL), deadline_s)
        return {str(name): held is True for name, held in json.loads(answer)["held"].items()}
    except (TimeoutError, ValueError, KeyError, TypeError, AttributeError, OSError):
        return {"the child starts": False}


@dataclass(frozen=True, slots=True)
class _Handed:
    """What the child gets. `what`: file, which is its stdin; folder: a listing on stdin and `descriptors`; bounds."""

    what: str
    stdin: int | bytes
    descriptors: tuple[int, ...] = ()


def _handed(opened: OpenFolder) -> _Handed:
    listing = json.dumps({"descriptors": opened.descriptors, "sizes": opened.sizes}).encode()
    return _Handed("folder", listing, tuple(opened.descriptors.values()))


async def _identified(name: str, handed: _Handed, deadline_s: float) -> ModelProfile:
    try:
        answer = await _run(handed, deadline_s)
    except TimeoutError:
        raise unusable(f"{name}: could not be read within {deadline_s:g} s", _TOO_MUCH) from None
    return decode_answer(name, answer)


async def _run(handed: _Handed, deadline_s: float) -> bytes:
    """What the child answers; nothing when it died. Raises TimeoutError."""
    return await answer_of(
        "coordinator.identify.child",
        handed.what,
        stdin=handed.stdin,
        most_bytes=MAX_ANSWER_BYTES,
        deadline_s=deadline_s,
        descriptors=handed.descriptors,
    )


def open_regular(path: Path) -> int:
    """A descriptor of a regular file; raises a HiveError that says what else it is. Never blocks on a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no file {path}", "check the path") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a valid path"
        raise unusable(f"{path} cannot be opened: {reason}", "check its permissions and path") from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise unusable(f"{path} is a directory, not a model file", _directory_hint(path))
    raise unusable(f"{path} is a device, pipe or socket, not a model file", "name a regular file")


def _directory_hint(path: Path) -> str:
    names = {child.name for child in path.iterdir()} if os.access(path, os.R_OK | os.X_OK) else set()
    if "saved_model.pb" in names:
        return "a TensorFlow SavedModel is not trained by hive: rebuild the model in PyTorch"
    if "config.json" in names:
        return "it is a Hugging Face directory: give it as model.source of a job"
    return "name the file in it: a .safetensors file, a PyTorch state dict, or FILE.py:FUNCTION"


def decode_answer(name: str, answer: bytes) -> ModelProfile:
    """The child read hostile bytes: what it says is checked like any other document. Raises SpecError."""
    try:
        document = json.loads(answer)
        error = document.get("error")
        if error is None:
            return documents.decode(ModelProfile, json.dumps(document["profile"]))
        if not error.get("message"):
            raise unusable(f"{name}: reading it took too much memory", _TOO_MUCH)
        said = from_document({key: str(value) for key, value in error.items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise unusable(f"{name}: the reader stopped without an answer", _TOO_MUCH) from None
    except SpecError as error:
        raise unusable(f"{name}: {error.message.removeprefix(f'{name}: ')}", error.hint) from None
    raise _named(name, said)


def _named(name: str, error: HiveError) -> HiveError:
    return type(error)(f"{name}: {error.message}", error.hint, code=error.code)
