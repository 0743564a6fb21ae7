"""Disk space kept back for the moment the disk is full: even a DELETE needs room then.

The file is given up when a write fails, so that the failure itself can be recorded, and taken again when there is room.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

RESERVE_BYTES = 8 * 1024 * 1024


class Reserve:
    def __init__(self, path: Path, reserve_bytes: int = RESERVE_BYTES) -> None:
        self._path = path
        self._bytes = reserve_bytes

    @property
    def held(self) -> bool:
        return self._path.exists()

    def release(self) -> None:
        self._path.unlink(missing_ok=True)

    def take(self) -> bool:
        """Set the space aside if several times as much is free; says whether it is held."""
        if self.held:
            return True
        try:
            if shutil.disk_usage(self._path.parent).free < 4 * self._bytes:
                return False
            with self._path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._bytes)
        except OSError:
            self._path.unlink(missing_ok=True)
            return False
        return True
