"""A rank that takes long over its first checkpoint, as one on a slow disk does: engine_harness with another channel."""

from __future__ import annotations

import time
from pathlib import Path

import engine_harness

SLOW_S = 3.0


class SlowChannel(engine_harness.RecordingChannel):
    _slow = True

    def checkpoint(self, folder: Path, step: int, samples: int) -> None:
        if self._slow:
            time.sleep(SLOW_S)
        self._slow = False
        super().checkpoint(folder, step, samples)


def run_rank(path: Path) -> None:
    """Ends the process."""
    engine_harness.RecordingChannel = SlowChannel  # type: ignore[misc]
    engine_harness.run_rank(path)
