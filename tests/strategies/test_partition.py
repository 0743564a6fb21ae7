from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.partition import RankSpeed, split_batch


def slowest_s(ranks: list[RankSpeed], samples: tuple[int, ...]) -> float:
    return max(rank.step_s(count) for rank, count in zip(ranks, samples, strict=True))


RANKS = st.lists(
    st.builds(RankSpeed, st.floats(0, 0.1), st.floats(1e-4, 0.1), st.integers(0, 12)), min_size=1, max_size=4
)


@settings(deadline=None, max_examples=300)
@given(RANKS, st.integers(1, 14), st.integers(0, 2))
def test_a_split_is_as_good_as_the_best_of_all_splits(ranks: list[RankSpeed], batch: int, least: int) -> None:
    every = product(*(range(least, min(rank.cap, batch) + 1) for rank in ranks))
    possible = [counts for counts in every if sum(counts) == batch]
    if not possible:
        with pytest.raises(ValueError, match=r"hold|has no"):
            split_batch(ranks, batch, least)
        return
    samples = split_batch(ranks, batch, least)
    assert sum(samples) == batch
    assert all(least <= count <= rank.cap for rank, count in zip(ranks, samples, strict=True))
    best = min(slowest_s(ranks, counts) for counts in possible)
    assert slowest_s(ranks, samples) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_equal_ranks_differ_by_at_most_one_sample() -> None:
    samples = split_batch([RankSpeed(0.001, 0.01, 1000)] * 3, 100)
    assert sorted(samples) == [33, 33, 34]


def test_twice_the_speed_takes_twice_the_samples() -> None:
    assert split_batch([RankSpeed(0.0, 0.01, 99), RankSpeed(0.0, 0.02, 99)], 90) == (60, 30)


def test_a_rank_too_slow_for_one_sample_gets_none() -> None:
    assert split_batch([RankSpeed(0.0, 0.001, 99), RankSpeed(5.0, 1.0, 99)], 10) == (10, 0)


def test_a_rank_too_slow_for_one_sample_gets_one_when_all_must_work() -> None:
    assert split_batch([RankSpeed(0.0, 0.001, 99), RankSpeed(5.0, 1.0, 99)], 10, least=1) == (9, 1)


def test_caps_push_samples_to_the_slower_rank() -> None:
    assert split_batch([RankSpeed(0.0, 0.001, 4), RankSpeed(0.0, 1.0, 99)], 10) == (4, 6)


@pytest.mark.parametrize(
    ("ranks", "batch"),
    [([], 1), ([RankSpeed(0, 0.1, 5)], 0), ([RankSpeed(0, 0.0, 5)], 1), ([RankSpeed(-1, 1.0, 5)], 1)],
)
def test_a_split_that_makes_no_sense_is_refused(ranks: list[RankSpeed], batch: int) -> None:
    with pytest.raises(ValueError):
        split_batch(ranks, batch)


def test_a_large_batch_over_many_ranks_is_cut_without_a_rest() -> None:
    ranks = [RankSpeed(0.001 * index, 1e-7 * (index + 1), 10**6) for index in range(64)]
    assert sum(split_batch(ranks, 10**6)) == 10**6
