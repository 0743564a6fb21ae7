"""One coordinator per home: an advisory lock that dies with its process, naming who holds it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from protos.errors import Conflict


class HomeLock:
    """Held from construction to `release`. Raises Conflict when another process (or store) has the same folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._file, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._file)
            raise Conflict(
                f"a coordinator is already running with pid {holder} on {folder}",
                "use that one, stop it, or give this one another home with HIVE_HOME",
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """The file stays: removing it would let two processes lock two different files."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
