"""What a step usually takes, from many that are not alike: pure.

Under a CPU quota a worker runs at full speed for a part of every 100 ms and stands still for the rest, so that most
short steps look as if there were no quota; pauses of other kinds (a checkpoint, a busy neighbour) are to be left out.
So steps that follow each other are put together into runs long enough to hold such periods many times: a run counts
with its mean, and the median of the runs is what is usual. A step that is as long as a run is a run by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

RUN_S = 1.0  # ten periods of a quota
LATELY_S = 30.0  # of training: what steps take now, not what they took hours ago


def usual(seconds: Sequence[float], values: Sequence[float] | None = None) -> float:
    """Median over runs of the mean of `values` (default: `seconds`); 0 without a step. `seconds` of whole steps in
    order, `values` one per step."""
    return median([fmean((values or seconds)[start:end]) for start, end in _runs(seconds)] or [0.0])


def _runs(seconds: Sequence[float]) -> list[tuple[int, int]]:
    """Index ranges of at least RUN_S each; what is left at the end belongs to the last."""
    runs: list[tuple[int, int]] = []
    start, so_far_s = 0, 0.0
    for at, step_s in enumerate(seconds, 1):
        so_far_s += step_s
        if so_far_s >= RUN_S:
            runs.append((start, at))
            start, so_far_s = at, 0.0
    if start < len(seconds):
        first = runs.pop()[0] if runs else start
        runs.append((first, len(seconds)))
    return runs
