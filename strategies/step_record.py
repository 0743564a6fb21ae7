"""What the steps of one rank took, each by itself: computing, waiting for other ranks, CPU time, bytes sent.

What is usual (strategies/usual_step.py), so that a stall does not count, without the first step (allocations, kernel
choice, the state on its way) unless there is no other. Bounded. Evaluations and checkpoints lie between steps and are
no part of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import NamedTuple, Protocol

from protos.work import StepTimes
from strategies.cpu_time import CpuSeconds, CpuTime
from strategies.usual_step import LATELY_S, RUN_S, usual

SEEN = 1000  # steps that are remembered


class Counters(Protocol):
    """What grows while a step runs: seconds this rank waited for others, and bytes it sent."""

    sync_s: float
    bytes_sent: int


class _Step(NamedTuple):
    compute_s: float
    sync_s: float
    cpu_s: float
    carrying_s: float
    bytes_sent: int


class StepRecord:
    """`cpu`: seconds this process has run on some core (strategies/cpu_time.py)."""

    def __init__(
        self,
        counters: Counters,
        clock: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], CpuSeconds] | None = None,
    ) -> None:
        self._counters = counters
        self._clock = clock
        self._cpu = cpu or CpuTime().seconds
        self._began = (0.0, 0.0, CpuSeconds(0.0, 0.0), 0)
        self._steps: deque[_Step] = deque(maxlen=SEEN)
        self._settled = False

    def begin(self) -> None:
        self._began = (self._clock(), self._counters.sync_s, self._cpu(), self._counters.bytes_sent)

    def end(self) -> None:
        started, waited_s, before, sent = self._began
        sync_s, cpu = self._counters.sync_s - waited_s, self._cpu()
        if len(self._steps) == 1 and not self._settled:
            self._steps.clear()
            self._settled = True
        self._steps.append(
            _Step(
                self._clock() - started - sync_s,
                sync_s,
                cpu.computing - before.computing,
                cpu.carrying - before.carrying,
                self._counters.bytes_sent - sent,
            )
        )

    def lately(self) -> StepTimes | None:
        """Of the steps of the last LATELY_S; None before there is one that says something."""
        seconds, steps = 0.0, []
        for step in reversed(self._steps):
            steps.append(step)
            seconds += step.compute_s + step.sync_s
            if seconds >= LATELY_S:
                break
        if not self._settled or seconds < RUN_S:
            return None
        steps.reverse()
        whole = [max(0.0, step.compute_s + step.sync_s) for step in steps]
        parts = ([step[part] for step in steps] for part in range(len(StepTimes.__slots__)))
        return StepTimes(*(max(0.0, usual(whole, values)) for values in parts))

    @property
    def compute_s(self) -> float:
        """Of a usual step, what was not spent waiting; 0 without a step."""
        return self._usual([step.compute_s for step in self._steps])

    @property
    def sync_s(self) -> float:
        return self._usual([step.sync_s for step in self._steps])

    @property
    def cpu_s(self) -> float:
        """Without what carried collectives, which is `carrying_s`."""
        return self._usual([step.cpu_s for step in self._steps])

    @property
    def carrying_s(self) -> float:
        return self._usual([step.carrying_s for step in self._steps])

    @property
    def bytes_sent(self) -> int:
        return int(median(step.bytes_sent for step in self._steps)) if self._steps else 0

    def _usual(self, values: list[float]) -> float:
        return max(0.0, usual([max(0.0, step.compute_s + step.sync_s) for step in self._steps], values))
