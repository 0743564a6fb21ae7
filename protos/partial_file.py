"""A file that arrives piece by piece: resumed where it stopped, checked against its digest, then renamed into place.

Invariants: nothing appears at the destination but the whole content, flushed to the disk; what turns out to be
something else is removed, so that the next try starts afresh. Methods block: call them in a thread. A write that is
under way when its caller is cancelled ends before `close` returns.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import blake3

from protos import limits
from protos.errors import ErrorCode, Exhausted, HiveError, SpecError
from protos.ids import Digest


class PartialFile:
    """What `path` already holds counts as received; it is read once to go on with its hash."""

    def __init__(self, path: Path, digest: Digest, total_bytes: int) -> None:
        self.held = 0
        self.total_bytes = total_bytes
        self._path = path
        self._digest = digest
        self._lock = threading.Lock()
        self._hasher = blake3.blake3()
        self._open = True
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        if path.stat().st_size > total_bytes:
            self._file.truncate(0)
        self._file.seek(0)
        while block := self._file.read(limits.CHUNK_BYTES):
            self._hasher.update(block)
            self.held += len(block)

    @property
    def complete(self) -> bool:
        return self.held == self.total_bytes

    def write(self, content: bytes) -> None:
        """Raises SpecError for more bytes than announced, Exhausted when the disk is full; what fitted is kept."""
        with self._lock:
            if not self._open:
                return
            if self.held + len(content) > self.total_bytes:
                self._drop()
                raise SpecError(f"more than the announced {self.total_bytes} bytes came for {self._digest}")
            view = memoryview(content)
            try:
                while view:
                    written = self._file.write(view)
                    self._hasher.update(view[:written])
                    self.held += written
                    view = view[written:]
            except OSError as error:
                raise disk_error(error, self._path) from error

    def finish(self, destination: Path) -> None:
        """Raises HiveError (corrupt) and forgets everything received when the content is not that of the digest."""
        with self._lock:
            if not self._open:
                return
            if self._hasher.hexdigest() != self._digest:
                self._drop()
                raise HiveError(
                    f"the {self.total_bytes} bytes that arrived are not those of {self._digest}",
                    "the file changed while it was sent, or was damaged on the way: try again",
                    code=ErrorCode.CORRUPT,
                )
            try:
                os.fsync(self._file.fileno())
                destination.parent.mkdir(parents=True, exist_ok=True)
                self._path.replace(destination)
                flush_folder(destination.parent)
            except OSError as error:
                raise disk_error(error, destination) from error

    def close(self) -> None:
        with self._lock:
            self._open = False
            self._file.close()

    def _drop(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.truncate(0)
        self._open = False


def flush_folder(folder: Path) -> None:
    """Make a rename in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path) -> Exhausted | HiveError:
    """A failure to write, as an error with a hint."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Exhausted(f"the disk with {path.parent} is full", "free some space there and try again")
    return HiveError(f"{path} cannot be written: {error.strerror}", "check the folder's permissions and its disk")
