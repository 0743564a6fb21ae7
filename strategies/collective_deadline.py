"""How long a collective may take before its peer counts as lost: planned from the predicted step, then from what steps
really take. Pure.

A dead peer shows by its closed connection and a node that is cut off by its lease; a frozen worker on a living node
shows by nothing but this deadline, so it is short. But a machine that is slower than was predicted must not be taken
for one, nor one that works alone for a while: ranks are patient where they wait for another's files or evaluation.
"""

from __future__ import annotations

from collections import deque
from statistics import median

SHORTEST_S = 10.0  # a first step is slow, and a link that is cut for seconds heals
LONGEST_PLANNED_S = 60.0  # unless a step is long itself
LONGEST_S = 600.0  # likewise
STEPS = 10.0
LEAST_STEPS = 3.0
SHARED_START_S = 20.0
SPREADS = 6.0  # MADs above the median that a step may take
SEEN = 50  # steps that are remembered
EVERY = 20  # steps between two looks
SLOWEST_DISK_BYTES_PER_S = 8e6
STATE_PER_WEIGHT = 4  # weights and at most three states of an optimizer


def planned_s(step_s: float, shared: bool) -> float:
    """Ten predicted steps, at least 10 s, and at most 60 s or three steps if those are longer.

    Ranks that share the model wait within a step for each other's compute, the last stage of a pipeline for all others
    to be traced and filled: never less than three whole steps beside a slow start.
    """
    longest_s = max(LONGEST_PLANNED_S, LEAST_STEPS * step_s)
    timeout_s = min(longest_s, max(SHORTEST_S, STEPS * step_s))
    return max(timeout_s, SHARED_START_S + LEAST_STEPS * step_s) if shared else timeout_s


def observed_s(seconds: list[float]) -> float:
    """Ten times median + 6 MAD of the steps seen, at least 10 s, and at most 600 s or three times if that is longer."""
    middle = median(seconds)
    usual_s = middle + SPREADS * median(abs(value - middle) for value in seconds)
    return min(max(LONGEST_S, LEAST_STEPS * usual_s), max(SHORTEST_S, STEPS * usual_s))


def patience_s(model_bytes: float) -> float:
    """Where another rank may be writing a file, or be at a piece of an evaluation: what a slow disk takes for the whole
    training state of a model, and at least 600 s."""
    return max(LONGEST_S, STATE_PER_WEIGHT * model_bytes / SLOWEST_DISK_BYTES_PER_S)


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
