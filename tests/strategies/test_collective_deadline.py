"""The deadline of a collective follows what steps really take."""

from __future__ import annotations

import pytest

from strategies.collective_deadline import (
    EVERY,
    LONGEST_S,
    SHORTEST_S,
    StepTimes,
    observed_s,
    patience_s,
    planned_s,
)


def test_the_planned_deadline_is_ten_predicted_steps_within_bounds() -> None:
    assert [planned_s(step_s, False) for step_s in (0.001, 1.0, 3.0, 15.0)] == [SHORTEST_S, 10.0, 30.0, 60.0]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("step_s", [21.0, 200.0, 1e4])
def test_a_step_of_any_length_can_be_made(step_s: float, shared: bool) -> None:
    assert planned_s(step_s, shared) >= 3 * step_s
    assert observed_s([step_s] * EVERY) >= 3 * step_s


def test_ranks_that_share_a_model_are_given_a_slow_start() -> None:
    assert planned_s(0.001, True) == pytest.approx(20.003)
    assert planned_s(100.0, True) == 320.0


def test_patience_follows_the_size_of_the_files_that_may_be_written() -> None:
    assert patience_s(100e6) == LONGEST_S
    assert patience_s(10e9) == 5000.0


def test_steps_that_are_slower_than_predicted_lengthen_it_and_a_single_slow_one_does_not() -> None:
    assert observed_s([8.0] * 20) == 80.0
    assert observed_s([0.5] * 19 + [30.0]) == SHORTEST_S
    assert observed_s([4.0, 6.0] * 10) == pytest.approx(10 * (5.0 + 6 * 1.0))
    assert observed_s([100.0] * 10) == LONGEST_S


def test_it_is_looked_at_every_so_many_steps() -> None:
    times = StepTimes()
    found = [times.step_ended(8.0 * step) for step in range(1, 2 * EVERY + 1)]
    assert [step for step, deadline in enumerate(found, 1) if deadline is not None] == [EVERY, 2 * EVERY]
    assert found[EVERY - 1] == 80.0
