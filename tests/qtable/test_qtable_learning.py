from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtable.backoff import residuals
from qtable.prior import load_prior
from qtable.replay import OutcomeRecord, apply, replay
from qtable.reward import reward
from qtable.state import ACTIONS, SHAPE, StateKey
from qtable.table import QTable
from qtable.update import corrected, q_learning
from strategies.cost import COST_MODEL_VERSION

KEY = StateKey(1, 2, 1, 0)


def fresh() -> QTable:
    return QTable.fresh(np.zeros(SHAPE), 1)


def record(seq: int, predicted_s: float = 10.0, measured_s: float = 20.0, version: int = 1) -> OutcomeRecord:
    return OutcomeRecord(seq, KEY, "data_parallel", predicted_s, measured_s, version)


def test_the_plain_rule_moves_a_tenth_of_the_way_to_the_bootstrapped_target() -> None:
    assert q_learning(2.0, 1.0, 5.0) == pytest.approx(2.0 + 0.1 * (1.0 + 0.9 * 5.0 - 2.0))
    assert q_learning(2.0, 1.0, 0.0, alpha=1.0) == 1.0


def test_iterating_the_plain_rule_solves_a_two_state_chain() -> None:
    """A pays 0 and leads to B, B pays 1 and ends: Q(B) = 1, Q(A) = gamma."""
    a = b = 0.0
    for _ in range(400):
        a = q_learning(a, 0.0, b)
        b = q_learning(b, 1.0, 0.0)
    assert (a, b) == (pytest.approx(0.9, abs=1e-3), pytest.approx(1.0, abs=1e-3))


@pytest.mark.parametrize(
    ("predicted_s", "measured_s", "expected"), [(1, 1, 0), (1, math.e, -1), (math.e, 1, 1), (1, 100, -2), (100, 1, 2)]
)
def test_the_reward_is_the_clipped_log_ratio(predicted_s: float, measured_s: float, expected: float) -> None:
    assert reward(predicted_s, measured_s) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_cannot_be_gives_no_reward(bad: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        reward(1.0, bad)
    with pytest.raises(ValueError, match="positive and finite"):
        reward(bad, 1.0)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=10), st.floats(-2, 2))
def test_up_to_ten_outcomes_the_residual_is_their_mean(rewards: list[float], q0: float) -> None:
    q = q0
    for count, value in enumerate(rewards, 1):
        q = corrected(q, q0, value, count)
    assert q - q0 == pytest.approx(statistics.fmean(rewards), abs=1e-9)


def test_after_many_outcomes_the_residual_still_follows_a_change() -> None:
    table = fresh()
    for _ in range(100):
        table.learn(KEY, "single_node", 1.0)
    for _ in range(40):
        table.learn(KEY, "single_node", -1.0)
    assert table.residual()[(*KEY, ACTIONS.index("single_node"))] < -0.9


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=30))
def test_mean_and_deviation_are_those_of_the_rewards(rewards: list[float]) -> None:
    table = fresh()
    for value in rewards:
        table.learn(KEY, "data_parallel", value)
    index = (*KEY, ACTIONS.index("data_parallel"))
    assert table.visits(KEY, "data_parallel") == len(rewards)
    assert table.mean[index] == pytest.approx(statistics.fmean(rewards), abs=1e-9)
    assert table.deviation(KEY, "data_parallel") == pytest.approx(statistics.stdev(rewards), abs=1e-6)
    assert table.deviation(KEY, "single_node") is None


def test_nothing_learned_means_no_correction_whatever_the_prior() -> None:
    assert set(residuals(load_prior().table(), KEY).values()) == {0.0}


def test_a_cell_borrows_from_its_neighbours_the_more_the_less_it_was_visited() -> None:
    table = fresh()
    table.learn(KEY, "data_parallel", -1.0)
    here = residuals(table, KEY)
    near = residuals(table, StateKey(0, 0, KEY.nodes, KEY.latency))
    far = residuals(table, StateKey(0, 0, 3, 2))
    assert here["data_parallel"] < near["data_parallel"] < far["data_parallel"] == pytest.approx(-0.25)
    assert here["single_node"] == near["single_node"] == 0.0
    for _ in range(60):
        table.learn(KEY, "data_parallel", -1.0)
    assert residuals(table, KEY)["data_parallel"] == pytest.approx(-1.0, abs=0.01)


def test_evidence_of_the_cell_itself_overrules_its_neighbours() -> None:
    table = fresh()
    other = StateKey(0, 0, 3, 2)
    for _ in range(30):
        table.learn(other, "data_parallel", 1.0)
        table.learn(KEY, "data_parallel", -1.0)
    assert residuals(table, KEY)["data_parallel"] < -0.8
    assert residuals(table, other)["data_parallel"] > 0.8


def test_an_outcome_is_applied_once_and_in_order() -> None:
    table = fresh()
    assert apply(table, record(5))
    assert not apply(table, record(5))
    assert not apply(table, record(3))
    assert table.visits(KEY, "data_parallel") == 1
    assert table.last_seq == 5


def test_an_outcome_of_another_cost_model_is_passed_over_but_counts_as_seen() -> None:
    table = fresh()
    assert not apply(table, record(5, version=2))
    assert (table.visits(KEY, "data_parallel"), table.last_seq) == (0, 5)


@given(st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0.1, 1e4)), max_size=20), st.integers(0, 20))
def test_replaying_from_anywhere_gives_the_same_table(times: list[tuple[float, float]], start: int) -> None:
    records = [record(seq, *pair) for seq, pair in enumerate(times, 1)]
    whole, halves = fresh(), fresh()
    replay(whole, records)
    replay(halves, records[:start])
    replay(halves, records)
    assert np.array_equal(whole.q, halves.q)
    assert np.array_equal(whole.n, halves.n)


def test_the_packaged_prior_is_of_this_cost_model_and_puts_no_strategy_above_zero() -> None:
    prior = load_prior()
    assert prior.cost_model_version == COST_MODEL_VERSION
    assert prior.q0.shape == SHAPE
    assert prior.q0.max() <= 0.0
    assert (prior.q0[..., ACTIONS.index("federated")] == -2.0).all(), "it is not built"
    for built in ("model_parallel", "pipeline_parallel"):
        assert (prior.q0[..., ACTIONS.index(built)] > -2.0).any()
