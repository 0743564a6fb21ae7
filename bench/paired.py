"""Ratios of measurements that were interleaved, with a bootstrap interval and an A/A control. Pure, deterministic.

A round measures the peer, the candidate, and the peer again. The candidate is compared with the geometric mean of its
two neighbours, so a drift of the machine that is even over a round cancels; the second peer over the first is the
control, which would be 1 on a machine that does nothing else. A gate is on the median ratio; a control that is off says
how far to trust it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

RESAMPLES = 10_000
CONFIDENCE = 0.95
QUIET = 0.03  # a control whose median is further from 1, or whose interval is wider than twice this, is noisy


@dataclass(frozen=True, slots=True)
class Round:
    """Three measurements of one quantity, in the order they were made; larger is better."""

    before: float
    candidate: float
    after: float

    @property
    def ratio(self) -> float:
        return self.candidate / math.sqrt(self.before * self.after)

    @property
    def control(self) -> float:
        return self.after / self.before


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median and the bootstrap interval around it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    ratio: Estimate
    control: Estimate
    rounds: int

    @property
    def noisy(self) -> bool:
        """The control says that differences of QUIET cannot be told from noise here."""
        return abs(self.control.median - 1.0) > QUIET or self.control.high - self.control.low > 2 * QUIET


def compare(rounds: Sequence[Round], seed: int = 0) -> Comparison:
    """Raises ValueError without a round, or with a measurement that is not positive."""
    if any(min(each.before, each.candidate, each.after) <= 0 for each in rounds):
        raise ValueError("a measurement is not positive")
    ratios = [each.ratio for each in rounds]
    controls = [each.control for each in rounds]
    return Comparison(estimate(ratios, seed), estimate(controls, seed), len(rounds))


def estimate(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The median with its percentile bootstrap interval (Efron 1979) at CONFIDENCE. ValueError without values."""
    if not values:
        raise ValueError("no values to summarise")
    draw = random.Random(seed)
    medians = [median(draw.choices(values, k=len(values))) for _ in range(resamples)]
    tail = (1 - CONFIDENCE) / 2
    return Estimate(median(values), percentile(medians, tail), percentile(medians, 1 - tail))


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the ordered values; `share` 0.5 is the median. Raises ValueError without values."""
    if not values:
        raise ValueError("no values to summarise")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
