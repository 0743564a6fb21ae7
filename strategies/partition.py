"""How a global batch is cut over unlike ranks: exact, in whole samples."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

NOISE = 0.15  # of repeated calibrations of one machine
_BISECTIONS = 100


@dataclass(frozen=True, slots=True)
class RankSpeed:
    """A rank's step takes fixed_s + seconds_per_sample * samples; it takes at most `cap` samples."""

    fixed_s: float
    seconds_per_sample: float
    cap: int

    def step_s(self, samples: int) -> float:
        return self.fixed_s + self.seconds_per_sample * samples if samples else 0.0


def split_batch(ranks: Sequence[RankSpeed], batch: int, least: int = 0) -> tuple[int, ...]:
    """b_i that minimise max_i(a_i + g_i b_i) over the ranks with work, sum b_i = batch, least <= b_i <= cap_i.

    Bisects the time T for the least one whose counts floor((T - a_i) / g_i) suffice, then takes what is too much from
    the slowest rank, sample by sample: no count above the least T is left, so the result is optimal.
    Raises ValueError when the caps do not hold the batch, or the batch has fewer than `least` samples for each rank.
    """
    if batch < 1 or any(rank.seconds_per_sample <= 0 or rank.fixed_s < 0 or rank.cap < 0 for rank in ranks):
        raise ValueError("a split needs a batch of at least one sample and ranks of positive time per sample")
    if sum(rank.cap for rank in ranks) < batch:
        raise ValueError(f"the ranks hold {sum(rank.cap for rank in ranks)} samples of a batch of {batch}")
    if batch < least * len(ranks) or any(rank.cap < least for rank in ranks):
        raise ValueError(f"a batch of {batch} has no {least} samples for each of {len(ranks)} ranks")
    low, high = 0.0, max(rank.step_s(min(rank.cap, batch)) for rank in ranks)
    while sum(_within(ranks, high, least)) < batch:  # rounding may cost the last sample
        high *= 1.0 + 1e-12
    samples = _within(ranks, high, least)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if sum(samples) == batch or not low < middle < high:  # counts that add up are those of the least time, too
            break
        fewer = _within(ranks, middle, least)
        if sum(fewer) >= batch:
            high, samples = middle, fewer
        else:
            low = middle
    slowest = [
        (-rank.step_s(count), index)
        for index, (rank, count) in enumerate(zip(ranks, samples, strict=True))
        if count > least
    ]
    heapq.heapify(slowest)
    for _ in range(sum(samples) - batch):
        _, index = heapq.heappop(slowest)
        samples[index] -= 1
        if samples[index] > least:
            heapq.heappush(slowest, (-ranks[index].step_s(samples[index]), index))
    return tuple(samples)


def alike(ranks: Sequence[RankSpeed], batch: int) -> Sequence[RankSpeed]:
    """Ranks whose speeds differ by no more than a repeated measurement would get equal slices: an uneven cut of equal
    machines costs more than it can win."""
    times = [rank.fixed_s + rank.seconds_per_sample * batch / len(ranks) for rank in ranks]
    if max(times) > (1 + NOISE) * min(times):
        return ranks
    fixed_s = sum(rank.fixed_s for rank in ranks) / len(ranks)
    per_sample_s = sum(rank.seconds_per_sample for rank in ranks) / len(ranks)
    return [RankSpeed(fixed_s, per_sample_s, rank.cap) for rank in ranks]


def _within(ranks: Sequence[RankSpeed], time_s: float, least: int) -> list[int]:
    return [max(least, min(rank.cap, int((time_s - rank.fixed_s) / rank.seconds_per_sample))) for rank in ranks]
