from __future__ import annotations

import collections
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtable.policy import Arm, Choice, Ledger, choose
from qtable.state import ACTIONS

RICH = Ledger(job_s=1e9)


def arms(predictions: dict[str, float]) -> dict[str, Arm]:
    """Without a known number of steps nothing is tried before the choice."""
    return {name: Arm(seconds, 0.1, None, 0.2) for name, seconds in predictions.items()}


def pick(
    predictions: dict[str, float], residuals: dict[str, float] | None = None, seed: int = 0, ledger: Ledger = RICH
) -> Choice:
    return choose(arms(predictions), residuals or {}, random.Random(seed), ledger, switch_s=2.0)


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
    for seed in range(2000):
        choice = pick(predictions, seed=seed)
        counts[choice.action] += 1
        assert choice.propensity == pytest.approx(0.05 if choice.explored else 0.95)
        assert choice.explored == (choice.action == "data_parallel")
    assert counts["data_parallel"] / 2000 == pytest.approx(0.05, abs=0.015)


def test_an_action_outside_the_band_is_never_tried() -> None:
    assert {pick({"data_parallel": 11.2, "single_node": 10.0}, seed=seed).action for seed in range(200)} == {
        "single_node"
    }


def test_what_the_corrections_say_decides_who_is_in_the_band() -> None:
    predictions = {"data_parallel": 10.0, "single_node": 10.0}
    assert {pick(predictions, {"data_parallel": -0.3}, seed).action for seed in range(200)} == {"single_node"}


def test_an_action_predicted_over_three_times_the_best_is_not_tried_even_if_corrected_into_the_band() -> None:
    predictions = {"data_parallel": 40.0, "single_node": 10.0}
    residuals = {"data_parallel": math.log(40 / 10.5)}
    assert {pick(predictions, residuals, seed).action for seed in range(200)} == {"single_node"}


def test_no_residual_makes_an_action_the_choice_that_is_predicted_over_three_times_the_best() -> None:
    predictions = {"data_parallel": 31.0, "single_node": 10.0}
    choice = pick(predictions, {"data_parallel": 2.0})
    assert (choice.action, choice.propensity, choice.expected_loss_s) == ("single_node", 1.0, 0.0)
    assert set(choice.utility) == {"single_node"}
    assert pick(predictions | {"data_parallel": 29.0}, {"data_parallel": 2.0}).action == "data_parallel"
    long = {"data_parallel": 31_000.0, "single_node": 10_000.0}
    choice = decide(long_job(long), {"data_parallel": 1.1})
    assert (choice.action, choice.trials) == ("single_node", ())


def test_what_was_measured_or_runs_is_not_masked_however_long_it_takes() -> None:
    """A measured step is no prediction: here what it competes with turns out to be three times as long."""
    seconds = {"data_parallel": 31.0, "single_node": 10.0}
    slow = {"single_node": -2.0}
    assert decide(long_job(seconds, data_parallel=True), slow).action == "data_parallel"
    assert decide(long_job(seconds), slow).action == "single_node"
    assert decide(long_job(seconds), slow, running="data_parallel").action == "data_parallel"


def test_an_empty_ledger_affords_no_exploration() -> None:
    predictions = {"data_parallel": 10.5, "single_node": 10.0}
    assert {pick(predictions, seed=seed, ledger=Ledger()).action for seed in range(200)} == {"single_node"}
    almost = Ledger(job_s=100.0, loss_s=0.6)
    assert {pick(predictions, seed=seed, ledger=almost).action for seed in range(200)} == {"single_node"}


def test_exploring_never_costs_more_than_a_hundredth_of_all_job_time() -> None:
    """A thousand jobs, each finished before the next: the predicted loss stays inside the ledger at every moment."""
    rng, ledger, explored = random.Random(7), Ledger(), 0
    for _ in range(1000):
        predictions = {"data_parallel": rng.uniform(9, 11), "single_node": rng.uniform(9, 11)}
        choice = choose(arms(predictions), {}, rng, ledger, switch_s=2.0)
        explored += choice.explored
        ledger = ledger.charged(choice.charge_s).credited(predictions[choice.action])
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
    choice = pick(predictions, residuals, seed)
    assert choice.action in predictions
    assert 0 < choice.propensity <= 1
    assert choice.utility[choice.action] >= max(choice.utility.values()) - math.log1p(0.10) - 1e-12
    assert choice.expected_loss_s >= 0
    assert pick(predictions, residuals, seed) == choice


def long_job(
    seconds: dict[str, float], deviation: float = 0.2, steps: int = 10_000, **measured: bool
) -> dict[str, Arm]:
    return {
        name: Arm(total_s, total_s / steps, steps, 0.05 if measured.get(name) else deviation, measured.get(name, False))
        for name, total_s in seconds.items()
    }


def decide(given: dict[str, Arm], residuals: dict[str, float] | None = None, running: str = "") -> Choice:
    return choose(given, residuals or {}, random.Random(0), Ledger(), switch_s=3.0, running=running)


def test_two_close_arms_of_a_long_job_are_tried_the_better_one_first_and_the_reason_says_so() -> None:
    choice = decide(long_job({"data_parallel": 1100.0, "single_node": 1000.0}))
    assert choice.trials == ("single_node", "data_parallel")
    assert (choice.action, choice.propensity, choice.explored) == ("single_node", 1.0, False)
    assert 20 <= choice.trial_steps <= 50
    assert choice.reason.startswith("tries single_node, then data_parallel for 50 steps each")


def test_nothing_is_tried_where_the_winner_is_clear_or_the_job_too_short() -> None:
    assert decide(long_job({"data_parallel": 2500.0, "single_node": 1000.0})).trials == ()
    assert decide(long_job({"data_parallel": 1100.0, "single_node": 1000.0}, steps=1000)).trials == ()
    assert decide(long_job({"data_parallel": 11.0, "single_node": 10.0})).trials == ()


def test_a_third_arm_is_tried_only_when_it_may_win() -> None:
    near = {"pipeline_parallel": 10_800.0, "data_parallel": 10_400.0, "single_node": 10_000.0}
    assert decide(long_job(near)).trials == ("single_node", "data_parallel", "pipeline_parallel")
    far = near | {"pipeline_parallel": 25_000.0}
    assert decide(long_job(far)).trials == ("single_node", "data_parallel")


def test_a_trial_that_was_good_ends_the_trying_and_one_that_was_bad_goes_on_with_the_next() -> None:
    """1. both are tried; 2. the first turns out quick: it stays; 3. it turns out slow: the other one has its turn."""
    good = long_job({"data_parallel": 1100.0, "single_node": 700.0}, single_node=True)
    kept = decide(good, running="single_node")
    assert (kept.action, kept.trials) == ("single_node", ())
    bad = long_job({"data_parallel": 1100.0, "single_node": 1090.0}, single_node=True)
    assert decide(bad, running="single_node").trials == ("data_parallel",)
    both = long_job({"data_parallel": 1100.0, "single_node": 1300.0}, single_node=True, data_parallel=True)
    last = decide(both, running="data_parallel")
    assert (last.action, last.trials, last.reason) == ("data_parallel", (), "the same was measured before")


def test_what_was_measured_is_not_corrected_a_second_time() -> None:
    given = long_job({"data_parallel": 1000.0, "single_node": 1100.0}, data_parallel=True, single_node=True)
    assert decide(given, {"data_parallel": -0.5}).action == "data_parallel"


def test_a_running_job_changes_only_for_more_than_twice_what_changing_costs() -> None:
    near = long_job({"data_parallel": 1000.0, "single_node": 1005.0}, data_parallel=True, single_node=True)
    stays = decide(near, running="single_node")
    assert stays.action == "single_node"
    assert "less than twice what changing to it costs" in stays.reason
    clear = long_job({"data_parallel": 1000.0, "single_node": 1400.0}, data_parallel=True, single_node=True)
    assert decide(clear, running="single_node").action == "data_parallel"


def test_the_expected_loss_grows_with_how_close_and_how_uncertain_the_others_are() -> None:
    close, far = (pick({"data_parallel": other, "single_node": 10.0}).expected_loss_s for other in (10.5, 20.0))
    assert 0 < far < 0.05 < close < 2
    sure = choose(long_job({"data_parallel": 10.5, "single_node": 10.0}, 0.01), {}, random.Random(0), Ledger(),
                  switch_s=3.0)  # fmt: skip
    assert sure.expected_loss_s < 0.01
    assert pick({"single_node": 10.0}).expected_loss_s == 0
