"""What the steps of one rank took, each by itself: computing, waiting for other ranks, bytes sent.

What is usual (strategies/usual_step.py), so that a stall does not count, without the first step (allocations, kernel
choice, the state on its way) unless there is no other. Bounded. Evaluations and checkpoints lie between steps and are
no part of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Protocol

from strategies.usual_step import usual

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
        self._settled = False

    def begin(self) -> None:
        self._began = (self._clock(), self._counters.sync_s, self._counters.bytes_sent)

    def end(self) -> None:
        started, waited_s, sent = self._began
        sync_s = self._counters.sync_s - waited_s
        if len(self._steps) == 1 and not self._settled:
            self._steps.clear()
            self._settled = True
        self._steps.append((self._clock() - started - sync_s, sync_s, self._counters.bytes_sent - sent))

    @property
    def compute_s(self) -> float:
        """Of a usual step, what was not spent waiting; 0 without a step."""
        return self._usual(0)

    @property
    def sync_s(self) -> float:
        return self._usual(1)

    @property
    def bytes_sent(self) -> int:
        return int(median(step[2] for step in self._steps)) if self._steps else 0

    def _usual(self, column: int) -> float:
        whole_s = [max(0.0, compute_s + sync_s) for compute_s, sync_s, _ in self._steps]
        return max(0.0, usual(whole_s, [step[column] for step in self._steps]))
