"""What the steps of one rank took, each by itself: computing, waiting for other ranks, bytes sent.

Medians, so that a first step (allocations, kernel choice), a stall or the transfer of the state before the first
step do not count. Bounded. Evaluations and checkpoints lie between steps and are no part of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Protocol

SEEN = 1000  # steps that are remembered


class Counters(Protocol):
    """What grows while a step runs: seconds this rank waited for others, and bytes it sent."""

    sync_s: float
    bytes_sent: int


class StepRecord:
    def __init__(self, counters: Counters, clock: Callable[[], float] = time.perf_counter) -> None:
        self._counters = counters
        self._clock = clock
        self._began = (0.0, 0.0, 0)
        self._steps: deque[tuple[float, float, int]] = deque(maxlen=SEEN)

    def begin(self) -> None:
        self._began = (self._clock(), self._counters.sync_s, self._counters.bytes_sent)

    def end(self) -> None:
        started, waited_s, sent = self._began
        sync_s = self._counters.sync_s - waited_s
        self._steps.append((self._clock() - started - sync_s, sync_s, self._counters.bytes_sent - sent))

    @property
    def compute_s(self) -> float:
        """Median time of a step that was not spent waiting; 0 without a step."""
        return self._median(0)

    @property
    def sync_s(self) -> float:
        return self._median(1)

    @property
    def bytes_sent(self) -> int:
        return int(self._median(2))

    def _median(self, column: int) -> float:
        return max(0.0, median(step[column] for step in self._steps)) if self._steps else 0.0
