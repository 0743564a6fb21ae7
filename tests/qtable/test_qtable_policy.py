from __future__ import annotations

import collections
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtable.policy import Choice, Ledger, choose
from qtable.state import ACTIONS

RICH = Ledger(job_s=1e9)


def pick(
    predictions: dict[str, float], residuals: dict[str, float] | None = None, seed: int = 0, ledger: Ledger = RICH
) -> Choice:
    return choose(predictions, (), residuals or {}, random.Random(seed), ledger)


def test_the_shortest_prediction_is_taken_when_nothing_was_learned() -> None:
    choice = pick({"data_parallel": 18.4, "single_node": 12.3})
    assert (choice.action, choice.propensity, choice.explored) == ("single_node", 1.0, False)


def test_a_tie_goes_to_the_single_node() -> None:
    assert pick({"data_parallel": 5.0, "single_node": 5.0}, ledger=Ledger()).action == "single_node"


def test_a_residual_overrules_the_prediction_and_the_reason_says_so() -> None:
    choice = pick({"data_parallel": 10.0, "single_node": 12.0}, {"data_parallel": -0.5})
    assert choice.action == "single_node"
    choice = pick({"data_parallel": 10.0, "single_node": 12.0}, {"single_node": 0.5})
    assert choice.action == "single_node"
    assert "corrected its prediction by -39%" in choice.reason


def test_nothing_feasible_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one action"):
        pick({})
    with pytest.raises(ValueError, match="positive, finite"):
        pick({"single_node": math.inf})


def test_an_action_in_the_band_is_tried_with_its_stated_propensity() -> None:
    counts: collections.Counter[str] = collections.Counter()
    predictions = {"data_parallel": 10.5, "single_node": 10.0}
    for seed in range(4000):
        choice = pick(predictions, seed=seed)
        counts[choice.action] += 1
        assert choice.propensity == pytest.approx(0.05 if choice.explored else 0.95)
        assert choice.explored == (choice.action == "data_parallel")
    assert counts["data_parallel"] / 4000 == pytest.approx(0.05, abs=0.015)


def test_an_action_outside_the_band_is_never_tried() -> None:
    assert {pick({"data_parallel": 11.2, "single_node": 10.0}, seed=seed).action for seed in range(500)} == {
        "single_node"
    }


def test_what_the_corrections_say_decides_who_is_in_the_band() -> None:
    predictions = {"data_parallel": 10.0, "single_node": 10.0}
    assert {pick(predictions, {"data_parallel": -0.3}, seed).action for seed in range(500)} == {"single_node"}


def test_an_action_predicted_over_three_times_the_best_is_not_tried_even_if_corrected_into_the_band() -> None:
    predictions = {"data_parallel": 40.0, "single_node": 10.0}
    residuals = {"data_parallel": math.log(40 / 10.5)}
    assert {pick(predictions, residuals, seed).action for seed in range(500)} == {"single_node"}


def test_a_masked_action_is_not_tried_but_may_be_best() -> None:
    rng = random.Random(0)
    near = {"data_parallel": 10.5, "single_node": 10.0}
    assert {choose(near, {"data_parallel"}, {}, rng, RICH).action for _ in range(500)} == {"single_node"}
    assert choose({"data_parallel": 5.0, "single_node": 10.0}, {"data_parallel"}, {}, rng, RICH).action == (
        "data_parallel"
    )


def test_an_empty_ledger_affords_no_exploration() -> None:
    predictions = {"data_parallel": 10.5, "single_node": 10.0}
    assert {pick(predictions, seed=seed, ledger=Ledger()).action for seed in range(500)} == {"single_node"}
    almost = Ledger(job_s=100.0, loss_s=0.6)
    assert {pick(predictions, seed=seed, ledger=almost).action for seed in range(500)} == {"single_node"}


def test_exploring_never_costs_more_than_a_hundredth_of_all_job_time() -> None:
    """A thousand jobs, each finished before the next: the predicted loss stays inside the ledger at every moment."""
    rng, ledger, explored = random.Random(7), Ledger(), 0
    for _ in range(1000):
        predictions = {"data_parallel": rng.uniform(9, 11), "single_node": rng.uniform(9, 11)}
        choice = choose(predictions, (), {}, rng, ledger)
        explored += choice.explored
        ledger = ledger.charged(choice.expected_loss_s).credited(predictions[choice.action])
        assert ledger.loss_s <= 0.01 * ledger.job_s
    assert explored > 5


@given(
    st.dictionaries(st.sampled_from(ACTIONS), st.floats(1e-3, 1e6), min_size=1),
    st.dictionaries(st.sampled_from(ACTIONS), st.floats(-2, 2)),
    st.integers(0, 2**32),
)
def test_every_choice_is_feasible_and_near_the_best(
    predictions: dict[str, float], residuals: dict[str, float], seed: int
) -> None:
    choice = choose(predictions, (), residuals, random.Random(seed), RICH)
    assert choice.action in predictions
    assert 0 < choice.propensity <= 1
    assert choice.utility[choice.action] >= max(choice.utility.values()) - math.log1p(0.10) - 1e-12
    assert choose(predictions, (), residuals, random.Random(seed), RICH) == choice
