"""Medians, bootstrap intervals and A/A controls of interleaved measurements, on figures known in advance."""

from __future__ import annotations

import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.paired import Round, compare, estimate, percentile

POSITIVE = st.floats(min_value=1e-3, max_value=1e6)


def test_a_drift_that_is_even_over_a_round_cancels() -> None:
    rounds = [Round(100.0, 50.0, 25.0), Round(25.0, 50.0, 100.0), Round(64.0, 64.0, 64.0)]
    assert [each.ratio for each in rounds] == pytest.approx([1.0, 1.0, 1.0])
    assert [each.control for each in rounds] == [0.25, 4.0, 1.0]


def test_one_disturbed_round_does_not_move_the_median() -> None:
    rounds = [Round(100.0, 98.0, 100.0)] * 6 + [Round(100.0, 5.0, 100.0)]
    found = compare(rounds)
    assert found.ratio.median == pytest.approx(0.98)
    assert found.ratio.low == pytest.approx(0.98)
    assert found.control.median == 1.0
    assert found.rounds == 7


def test_a_control_away_from_one_is_called_noisy() -> None:
    quiet = [Round(100.0, 99.0, 100.5), Round(100.0, 99.0, 99.5), Round(100.0, 99.0, 100.0)]
    assert not compare(quiet).noisy
    assert compare([*quiet, Round(100.0, 99.0, 70.0), Round(100.0, 99.0, 140.0)]).noisy
    assert compare([Round(100.0, 99.0, 110.0)] * 7).noisy


def test_the_interval_is_that_of_the_resampled_medians() -> None:
    values = [0.90, 0.95, 0.97, 0.98, 0.99, 1.01, 1.05]
    draw = random.Random(3)
    medians = sorted(median(draw.choices(values, k=7)) for _ in range(2000))
    found = estimate(values, seed=3, resamples=2000)
    assert found.median == 0.98
    assert found.low == pytest.approx(percentile(medians, 0.025))
    assert found.high == pytest.approx(percentile(medians, 0.975))
    assert 0.90 <= found.low < 0.98 < found.high <= 1.05


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [1.0, 1.1, 0.9, 1.3, 0.7]
    assert estimate(values, seed=5) == estimate(values, seed=5)


@given(st.lists(POSITIVE, min_size=1, max_size=9), st.integers(0, 9))
def test_an_interval_holds_its_median_and_stays_within_the_values(values: list[float], seed: int) -> None:
    found = estimate(values, seed, resamples=200)
    assert min(values) <= found.low <= found.high <= max(values)
    assert found.median == median(values)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 10.0), (0.25, 17.5), (0.5, 25.0), (0.95, 38.5), (1.0, 40.0)])
def test_a_percentile_lies_between_its_neighbours(share: float, expected: float) -> None:
    assert percentile([40.0, 10.0, 30.0, 20.0], share) == pytest.approx(expected)


def test_measurements_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        compare([Round(1.0, 0.0, 1.0)])
    with pytest.raises(ValueError, match="no values"):
        compare([])
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)
