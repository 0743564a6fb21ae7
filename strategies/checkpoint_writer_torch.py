"""Periodic checkpoints written by a thread while training goes on.

The state is copied in the training thread (it is that of a committed step) and written beside it; one write at a time.
A failed write, such as a full disk, is raised in the training thread at the next `poll`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from strategies import checkpoint_torch
from strategies.checkpoint_torch import TrainingState


class CheckpointWriter:
    """`announce(folder, step, samples)` is called in the training thread once a checkpoint lies on the disk."""

    def __init__(
        self, root: Path, digest: str, keep: int, every_s: float, announce: Callable[[Path, int, int], None]
    ) -> None:
        self._root = root
        self._digest = digest
        self._keep = keep
        self._every_s = every_s
        self._announce = announce
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[Future[Path], TrainingState] | None = None
        self._due = time.monotonic() + every_s

    @property
    def busy(self) -> bool:
        """A checkpoint is being written, or written and not announced yet."""
        return self._writing is not None

    def due(self) -> bool:
        """Time for the next one, and the last one has been written."""
        return not self.busy and time.monotonic() >= self._due

    def start(self, state: TrainingState) -> None:
        """`state` must be a copy. Waits for a write that is under way."""
        self.finish()
        self._due = time.monotonic() + self._every_s
        work = self._thread.submit(checkpoint_torch.write, self._root, state, self._digest, self._keep)
        self._writing = (work, state)

    def poll(self) -> None:
        """Announces a finished write; raises what it raised."""
        if self._writing is not None and self._writing[0].done():
            self._take()

    def write_announced(self, state: TrainingState) -> None:
        """In this thread, which waits: for a state of which there is no room for a copy."""
        self._due = time.monotonic() + self._every_s
        self._announce(self.write_now(state), state.step, state.samples)

    def write_now(self, state: TrainingState) -> Path:
        """After any write under way, in this thread."""
        self.finish()
        return checkpoint_torch.write(self._root, state, self._digest, self._keep)

    def finish(self) -> None:
        if self._writing is not None:
            self._take()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> None:
        assert self._writing is not None
        (work, state), self._writing = self._writing, None
        self._announce(work.result(), state.step, state.samples)
