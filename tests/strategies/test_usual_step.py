"""What steps usually take, whatever order and however unlike they are."""

from __future__ import annotations

from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.usual_step import RUN_S, usual


def test_a_quota_that_stops_one_step_in_five_counts() -> None:
    """25 ms of every 100: four steps of 6 ms, then one of 76."""
    steps = [0.006, 0.006, 0.006, 0.006, 0.076] * 200
    assert usual(steps) == pytest.approx(0.02, rel=0.05)


def test_a_stall_does_not_count() -> None:
    steps = [0.01] * 600
    steps[250] = 30.0
    assert usual(steps) == pytest.approx(0.01, rel=1e-6)


def test_long_steps_are_runs_by_themselves() -> None:
    assert usual([2.0, 2.0, 90.0, 2.0, 2.5]) == 2.0


def test_of_a_short_job_all_steps_count() -> None:
    assert usual([0.1, 0.1, 0.4]) == pytest.approx(0.2)
    assert usual([]) == 0.0


def test_another_figure_of_the_same_steps() -> None:
    assert usual([0.5, 0.5, 1.0, 1.0], [0.1, 0.3, 0.2, 0.2]) == pytest.approx(0.2)


@given(st.lists(st.floats(1e-4, 10 * RUN_S), min_size=1, max_size=200))
def test_it_lies_between_the_shortest_and_the_longest_and_is_the_mean_of_equal_ones(steps: list[float]) -> None:
    assert min(steps) * (1 - 1e-9) <= usual(steps) <= max(steps) * (1 + 1e-9)
    assert usual([steps[0]] * len(steps)) == pytest.approx(fmean([steps[0]]))
