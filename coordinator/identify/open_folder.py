"""The parent's half of a directory: opens what its readers want, relative to the directory, and only regular files.

Invariants: nothing is opened by following a link, but for those of the Hugging Face cache, whose shape is exact; never
blocks on a pipe; the number of files opened and seen is bounded; who asks closes what was opened.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.identify.folder import FOLDERS, MAX_OPENED, MAX_SEEN, worth_opening
from coordinator.identify.tensors import unusable
from protos.errors import NotFound, SpecError

_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | os.O_NOFOLLOW
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_CACHE_LINK = re.compile(r"\.\./\.\./blobs/([0-9a-f]{40}|[0-9a-f]{64})")  # of a snapshot in the Hugging Face cache


@dataclass(slots=True)
class OpenFolder:
    descriptors: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def open_folder(path: Path) -> Iterator[OpenFolder]:
    """Raises NotFound, and SpecError for what cannot be opened or holds too much."""
    found = OpenFolder()
    try:
        with _directory(path) as directory:
            _look(directory, "", found)
            for name in sorted(FOLDERS):
                with contextlib.suppress(OSError), _below(directory, name) as below:
                    _look(below, f"{name}/", found)
        yield found
    finally:
        for descriptor in found.descriptors.values():
            os.close(descriptor)


@contextlib.contextmanager
def open_named(files: Mapping[str, Path]) -> Iterator[OpenFolder]:
    """The same of files that lie elsewhere under other names, as a store of content keeps them."""
    found = OpenFolder()
    try:
        for name, path in files.items():
            descriptor = os.open(path, _FILE)
            _take(descriptor, name, found)
        yield found
    finally:
        for descriptor in found.descriptors.values():
            os.close(descriptor)


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # the user named it: may be a link
    except FileNotFoundError:
        raise NotFound(f"there is no directory {path}", "check the path") from None
    except OSError as error:
        raise unusable(f"{path} cannot be opened: {error.strerror}", "check its permissions and path") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _below(directory: int, name: str) -> Iterator[int]:
    descriptor = os.open(name, _DIRECTORY, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _look(directory: int, prefix: str, found: OpenFolder) -> None:
    room = MAX_SEEN - len(found.sizes)
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, room + 1))
    if len(names) > room:
        raise unusable(f"the directory has over {MAX_SEEN} entries", "name the file that holds the model")
    for name in names:
        if worth_opening(prefix + name):
            if (descriptor := _opened(directory, name, prefix)) is not None:
                _take(descriptor, prefix + name, found)
            continue
        with contextlib.suppress(OSError):  # gone meanwhile
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                found.sizes[prefix + name] = status.st_size if stat.S_ISREG(status.st_mode) else 0


def _opened(directory: int, name: str, prefix: str) -> int | None:
    """None for a directory of that name. Raises SpecError for what is neither a file nor one."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            return None
        if stat.S_ISLNK(status.st_mode):
            return _of_cache(directory, name)
        return os.open(name, _FILE, dir_fd=directory)
    except OSError as error:
        raise unusable(f"{prefix}{name} cannot be opened: {error.strerror}", "check its permissions") from None


def _of_cache(directory: int, name: str) -> int:
    target = _CACHE_LINK.fullmatch(os.readlink(name, dir_fd=directory))
    if target is None:
        raise unusable(f"{name} is a link, which may lead anywhere", "copy the directory with its files: cp -rL")
    with _below(directory, "../../blobs") as blobs:
        return os.open(target[1], _FILE, dir_fd=blobs)


def _take(descriptor: int, name: str, found: OpenFolder) -> None:
    """Keeps a descriptor of a regular file under its name; else closes it and raises SpecError."""
    problem: SpecError | None = None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        problem = unusable(f"{name} is a device, pipe or socket, not a file", "remove it from the directory")
    elif len(found.descriptors) >= MAX_OPENED:
        problem = unusable(f"the directory has over {MAX_OPENED} files of weights", "join some of them")
    if problem is not None:
        os.close(descriptor)
        raise problem
    found.descriptors[name] = descriptor
    found.sizes[name] = status.st_size
