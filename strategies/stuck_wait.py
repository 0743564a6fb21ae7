"""The last word of a rank whose own thread cannot come back from a collective.

When a connection fails, gloo tells the operations that wait to start, but not one whose message is partly written or
read: that wait ends at the deadline only. Whoever stops the rank sees that it is still in the same wait, and says in
its place how it ends. Invariant: one thread only says so; the process is over then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from protos.work import Outcome

STUCK_S = 0.5  # in one wait, after its connections were shut down


class Waits(Protocol):
    """strategies.group_torch.Group."""

    waits_since: float | None  # when the wait began in which the rank is now


class LastWord:
    def __init__(self, group: Waits) -> None:
        self._group = group
        self._said = threading.Lock()
        self._back = threading.Event()

    def say(self, outcome: Callable[[], Outcome]) -> Outcome:
        """For the rank's own thread. Does not return when the other is about to end this process."""
        with self._said:
            self._back.set()
            return outcome()

    def over(self) -> None:
        """For the rank's own thread: it needs nobody to speak for it. Does not return when the other is about to end
        this process."""
        with self._said:
            self._back.set()

    def say_if_stuck(self, outcome: Callable[[], Outcome], leave: Callable[[Outcome], None]) -> None:
        """For the thread that has just broken the group: returns when the rank's own has come back. `leave` does not
        return."""
        while not self._back.is_set():
            since = self._group.waits_since
            self._back.wait(STUCK_S)
            if since is None or since != self._group.waits_since:
                continue
            with self._said:
                if not self._back.is_set():
                    leave(outcome())


__all__ = ["STUCK_S", "LastWord"]
