from __future__ import annotations

import math
import random
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtable.backoff import LEAST_DEVIATION, PRIOR_DEVIATION, deviations
from qtable.probing import Arm, Belief, abort, expected_loss_s, trials, worth_switching
from qtable.state import SHAPE, StateKey
from qtable.table import QTable

KEY = StateKey(1, 2, 1, 0)
BELIEFS = st.builds(Belief, st.floats(1.0, 100.0), st.floats(0.01, 0.6))


def draws(each: Belief, rng: random.Random, count: int) -> list[float]:
    return [each.median_s * math.exp(rng.gauss(0, each.deviation)) for _ in range(count)]


def test_the_expected_loss_is_what_drawing_many_times_gives() -> None:
    beliefs = {"a": Belief(10.0, 0.2), "b": Belief(11.0, 0.3), "c": Belief(12.0, 0.1)}
    rng, count = random.Random(1), 40_000
    a, b, c = (draws(each, rng, count) for each in beliefs.values())
    drawn = fmean(max(0.0, x - min(y, z)) for x, y, z in zip(a, b, c, strict=True))
    assert expected_loss_s("a", beliefs) == pytest.approx(drawn, rel=0.03)


def test_the_gain_of_trying_is_what_drawing_many_times_gives() -> None:
    arms = {name: Arm(seconds, 0.01, 100_000, 0.2) for name, seconds in (("a", 1000.0), ("b", 1050.0), ("c", 1300.0))}
    beliefs = {name: Belief(arm.seconds, arm.deviation) for name, arm in arms.items()}
    found = trials(arms, beliefs, ["a", "b", "c"], switch_s=1.0)
    assert found.actions == ("a", "b", "c")
    rng, count = random.Random(1), 40_000
    tried = [draws(beliefs[name].foreseen, rng, count) for name in found.actions]
    least = fmean(min(each) for each in zip(*tried, strict=True))
    assert found.gain_s == pytest.approx(beliefs["a"].mean_s - least, rel=0.03)
    assert found.cost_s == pytest.approx(3 * 1.0, rel=0.01)


@given(BELIEFS, BELIEFS, st.floats(0.1, 50.0))
def test_only_what_saves_more_than_it_costs_is_tried(a: Belief, b: Belief, switch_s: float) -> None:
    beliefs = {"a": a, "b": b}
    arms = {name: Arm(each.median_s, each.median_s / 5000, 5000, each.deviation) for name, each in beliefs.items()}
    ranked = sorted(arms, key=lambda name: arms[name].seconds)
    found = trials(arms, beliefs, ranked, switch_s)
    if found.actions:
        assert found.gain_s > found.cost_s > 0
        assert found.steps >= 20
        assert all(100 * found.steps * arms[name].step_s <= beliefs[ranked[0]].median_s for name in found.actions)


@given(st.dictionaries(st.sampled_from("abcde"), BELIEFS, min_size=1))
def test_an_expected_loss_is_never_negative_and_never_more_than_the_mean(beliefs: dict[str, Belief]) -> None:
    for name, each in beliefs.items():
        assert 0 <= expected_loss_s(name, beliefs) <= each.mean_s


def test_a_strategy_is_left_when_the_runner_up_promises_a_quarter_more() -> None:
    assert abort(measured_s=1.30, runner_up_s=1.0)
    assert not abort(measured_s=1.20, runner_up_s=1.0)


def test_a_change_pays_from_twice_its_cost() -> None:
    assert worth_switching(gain_s=21.0, cost_s=10.0)
    assert not worth_switching(gain_s=20.0, cost_s=10.0)


def seen(rewards: list[float], key: StateKey = KEY) -> dict[str, float]:
    table = QTable.fresh(np.zeros(SHAPE), 1)
    for reward in rewards:
        table.learn(key, "data_parallel", reward)
    return deviations(table, KEY)


def test_an_action_that_was_never_taken_is_as_uncertain_as_a_first_run() -> None:
    assert seen([])["single_node"] == pytest.approx(PRIOR_DEVIATION)
    assert seen([0.7])["data_parallel"] == pytest.approx(PRIOR_DEVIATION)  # one outcome has no spread


def test_the_spread_that_was_seen_takes_the_place_of_the_prior() -> None:
    wide, narrow = seen([0.6, -0.6] * 20), seen([0.1, 0.1] * 20)
    assert wide["data_parallel"] == pytest.approx(0.6, rel=0.05)
    assert narrow["data_parallel"] == LEAST_DEVIATION
    assert wide["single_node"] == PRIOR_DEVIATION


def test_neighbours_say_something_about_a_cell_without_visits() -> None:
    elsewhere = seen([0.1, 0.1] * 20, KEY._replace(complexity=3))
    assert LEAST_DEVIATION <= elsewhere["data_parallel"] < PRIOR_DEVIATION
