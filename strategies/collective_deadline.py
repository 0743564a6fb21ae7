"""How long a collective may take before its peer counts as lost: planned from the predicted step, then from what steps
really take. Pure.

A frozen or unreachable peer shows by nothing else, so the deadline is short; but a machine that is slower than was
predicted must not be taken for one.
"""

from __future__ import annotations

from collections import deque
from statistics import median

SHORTEST_S = 10.0  # a first step is slow, and a link that is cut for seconds heals
LONGEST_PLANNED_S = 60.0
LONGEST_S = 600.0
STEPS = 10.0
SPREADS = 6.0  # MADs above the median that a step may take
SEEN = 50  # steps that are remembered
EVERY = 20  # steps between two looks


def planned_s(step_s: float) -> float:
    """Ten predicted steps, within bounds."""
    return min(LONGEST_PLANNED_S, max(SHORTEST_S, STEPS * step_s))


def observed_s(seconds: list[float]) -> float:
    """Ten times median + 6 MAD of the steps seen, within bounds."""
    middle = median(seconds)
    spread = median(abs(value - middle) for value in seconds)
    return min(LONGEST_S, max(SHORTEST_S, STEPS * (middle + SPREADS * spread)))


class StepTimes:
    """Durations of the last steps; says when the deadline should be set anew."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=SEEN)
        self._last_s: float | None = None
        self._count = 0

    def step_ended(self, now_s: float) -> float | None:
        """The new deadline, every so many steps."""
        if self._last_s is not None:
            self._seconds.append(now_s - self._last_s)
        self._last_s = now_s
        self._count += 1
        if self._count % EVERY == 0 and len(self._seconds) >= EVERY // 2:
            return observed_s(list(self._seconds))
        return None
