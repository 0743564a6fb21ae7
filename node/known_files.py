"""Digests of files that were hashed before, so that a big file is read once and not at every question.

A file is known by its path, size, modification time and inode; any of them differing means hashing again. A file that
changed within the last seconds is not remembered: a second change could leave all four as they are. Kept across
restarts in one JSON file, whose loss costs time only.
"""

from __future__ import annotations

import json
import stat
import threading
import time
from pathlib import Path

from protos.artifact import digest_file
from protos.ids import Digest

SETTLED_S = 3.0
PERSIST_BYTES = 16 * 1024 * 1024
MAX_FILES = 10_000

_Stamp = tuple[int, int, int]  # bytes, mtime_ns, inode


class KnownFiles:
    """Thread-safe. `digest` blocks while it reads a file it does not know."""

    def __init__(self, record: Path | None = None) -> None:
        self._record = record
        self._lock = threading.Lock()
        self._known: dict[str, tuple[_Stamp, Digest]] = _load(record)

    def digest(self, path: Path) -> Digest | None:
        """None when it is not a readable regular file. Never opens a device or a pipe."""
        try:
            before = _stamp(path)
            if before is None:
                return None
            with self._lock:
                known = self._known.get(str(path))
            if known is not None and known[0] == before:
                return known[1]
            digest = digest_file(path)
            if _stamp(path) != before:
                return None  # it is being written
        except OSError:
            return None
        if time.time() - before[1] / 1e9 > SETTLED_S:
            self._remember(path, before, digest)
        return digest

    def verified(self, path: Path, digest: Digest) -> None:
        """Remember a file that was just checked and that nobody else writes."""
        if (stamp := _stamp(path)) is not None:
            self._remember(path, stamp, digest)

    def _remember(self, path: Path, stamp: _Stamp, digest: Digest) -> None:
        with self._lock:
            self._known.pop(str(path), None)
            self._known[str(path)] = (stamp, digest)
            while len(self._known) > MAX_FILES:
                self._known.pop(next(iter(self._known)))
            if self._record is not None and stamp[0] >= PERSIST_BYTES:
                _save(self._record, self._known)


def _stamp(path: Path) -> _Stamp | None:
    status = path.stat()
    return (status.st_size, status.st_mtime_ns, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _load(record: Path | None) -> dict[str, tuple[_Stamp, Digest]]:
    try:
        document = json.loads(record.read_bytes()) if record is not None else {}
        return {
            str(path): ((int(size), int(mtime_ns), int(inode)), Digest(str(digest)))
            for path, (size, mtime_ns, inode, digest) in document.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _save(record: Path, known: dict[str, tuple[_Stamp, Digest]]) -> None:
    big = {path: [*stamp, digest] for path, (stamp, digest) in known.items() if stamp[0] >= PERSIST_BYTES}
    fresh = record.with_name(record.name + ".new")
    try:
        fresh.write_text(json.dumps(big))
        fresh.replace(record)
    except OSError:
        fresh.unlink(missing_ok=True)
