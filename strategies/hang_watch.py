"""Where the user's code hangs: its stack in the task's own output, shortly before the time is up.

A thread looks, so it sees whatever lets other threads run: loops, sleeps, sockets, locks.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

_FRAMES = 8  # with their source lines they fit the lines that are kept of a task


@contextmanager
def stack_shown_after(seconds: float) -> Iterator[None]:
    """If the body still runs after so long, this thread's stack is written to stderr, once; the body goes on."""
    watched = threading.get_ident()

    def show() -> None:
        frame = sys._current_frames().get(watched)
        if frame is not None:
            lines = traceback.format_stack(frame)[-_FRAMES:]
            sys.stderr.write(f"still here after {seconds:g} s (most recent call last):\n{''.join(lines)}")
            sys.stderr.flush()

    timer = threading.Timer(seconds, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


__all__ = ["stack_shown_after"]
