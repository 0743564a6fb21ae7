"""What learning was worth: errors before and after, choices changed, and policies that were not the one that ran."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from qtable import heat
from qtable.backoff import residuals
from qtable.evaluate import Decided, Evaluation
from qtable.policy import BAND
from qtable.reward import reward
from qtable.state import ACTIONS, SHAPE, Observation, StateKey
from qtable.table import QTable

KEY = StateKey(1, 2, 1, 0)
TIMES = {"data_parallel": 10.0, "single_node": 11.0}


def decided(taken: str = "data_parallel", propensity: float = 1.0, forced: bool = False, **learned: float) -> Decided:
    return Decided(TIMES, learned, taken, propensity, forced)


def test_a_lasting_error_is_learned_and_the_summary_says_by_how_much() -> None:
    """Jobs twice as slow as predicted: the first is mispredicted either way, later ones only without learning."""
    table, tally = QTable.fresh(np.zeros(SHAPE), 1), Evaluation()
    for number in range(50):
        tally.decide(f"p-{number}", Decided(TIMES, residuals(table, KEY), "data_parallel", 1.0, False))
        tally.finish(f"p-{number}", "data_parallel", 10.0, 20.0, 0.0)
        table.learn(KEY, "data_parallel", reward(10.0, 20.0))
    found = tally.summary()
    whole, own = found["errors"]
    assert {**whole, "action": "data_parallel"} == own
    assert whole["error_without"] == whole["median_without"] == -whole["bias_without"] == pytest.approx(math.log(2))
    assert whole["error_with"] < 0.07 and whole["median_with"] < 0.01
    assert found["choices"] == {"decisions": 50, "changed": 49, "share": 0.98}


def test_what_was_learned_after_a_decision_does_not_judge_it() -> None:
    tally = Evaluation()
    tally.decide("p", decided(data_parallel=0.0))
    tally.finish("p", "data_parallel", 10.0, 20.0, residual=-math.log(2))
    assert tally.summary()["errors"][0]["error_with"] == pytest.approx(math.log(2))
    tally.finish("of another log", "data_parallel", 10.0, 20.0, residual=-math.log(2))
    assert tally.summary()["errors"][0]["error_with"] == pytest.approx(math.log(2) / 2)


def test_the_estimate_of_a_policy_that_was_explored_only_meets_its_true_value() -> None:
    """Logged: the quicker prediction with 0.8. The other takes 1.2 of it in truth."""
    rng, tally, truth = random.Random(3), Evaluation(), {"data_parallel": 2.0, "single_node": 1.2}
    for number in range(4000):
        taken, chance = ("data_parallel", 0.8) if rng.random() < 0.8 else ("single_node", 0.2)
        tally.decide(f"p-{number}", decided(taken, chance, single_node=1.0))
        measured_s = 10.0 * truth[taken] * rng.lognormvariate(0.0, 0.1)
        tally.finish(f"p-{number}", taken, TIMES[taken], measured_s, 0.0)
    policies = {each["policy"]: each for each in tally.summary()["policies"]}
    assert policies["predictions alone"]["ratio"] == pytest.approx(2.0, rel=0.01)
    assert policies["with what was learned"]["ratio"] == pytest.approx(1.2, rel=0.02)
    assert policies["as it was"]["ratio"] == pytest.approx(2.0**0.8 * 1.2**0.2, rel=0.02)
    assert policies["with what was learned"]["effective"] == pytest.approx(policies["with what was learned"]["matched"])


def test_a_forced_choice_teaches_the_errors_and_no_policy() -> None:
    tally = Evaluation()
    tally.decide("p", decided(forced=True, single_node=1.0))
    tally.finish("p", "data_parallel", 10.0, 12.0, 0.0)
    found = tally.summary()
    assert (found["jobs"], found["choices"]["decisions"]) == (1, 0)
    assert all(each["matched"] == 0 and each["ratio"] is None for each in found["policies"])


@pytest.mark.parametrize(
    "odd",
    [
        Decided(TIMES, {}, "federated", 1.0, False),
        Decided({}, {}, "single_node", 1.0, False),
        Decided({"single_node": 0.0}, {}, "single_node", 1.0, False),
        Decided({"single_node": math.inf}, {}, "single_node", 1.0, False),
        Decided(TIMES, {}, "single_node", 0.0, False),
    ],
)
def test_a_decision_that_cannot_be_is_left_out(odd: Decided) -> None:
    tally = Evaluation()
    tally.decide("p", odd)
    assert tally.decisions == 0
    with pytest.raises(ValueError, match="positive and finite"):
        tally.finish("p", "single_node", 1.0, 0.0, 0.0)


def test_nothing_yet_is_an_answer_too() -> None:
    found = Evaluation().summary()
    assert (found["jobs"], found["errors"], found["choices"]["share"]) == (0, [], None)


def test_confidence_grows_with_visits_and_falls_with_spread() -> None:
    assert heat.confidence(0, 0.2) == 0.0
    rising = [heat.confidence(visits, 0.2) for visits in (1, 2, 5, 20, 100)]
    assert rising == sorted(rising) and rising[0] > 0.3 and rising[-1] > 0.99
    assert heat.confidence(5, 0.5) < heat.confidence(5, 0.1)


def test_confidence_is_how_often_the_mean_of_so_many_jobs_is_within_a_tenth() -> None:
    rng, visits, spread = random.Random(1), 4, 0.2
    means = [sum(rng.gauss(0.0, spread) for _ in range(visits)) / visits for _ in range(4000)]
    share = sum(abs(each) < math.log1p(BAND) for each in means) / len(means)
    assert heat.confidence(visits, spread) == pytest.approx(share, abs=0.02)


def test_every_cell_is_shown_with_its_best_action() -> None:
    table = QTable.fresh(np.tile([-0.3, -0.4, -0.5, -2.0, -0.1], (4, 3, 4, 3, 1)), 1)
    table.learn(KEY, "data_parallel", 1.0)
    table.learn(KEY, "data_parallel", 0.8)
    shown = {tuple(cell["key"]): cell for cell in heat.cells(table)}
    assert len(shown) == 144
    cell = shown[tuple(KEY)]
    assert (cell["best"], cell["visits"]) == ("data_parallel", 2)
    learned = cell["actions"]["data_parallel"]
    assert learned["Q"] == pytest.approx(0.6) and learned["residual"] == pytest.approx(0.9)
    assert (learned["n"], learned["mean"], learned["M2"]) == (2, pytest.approx(0.9), pytest.approx(0.02))
    assert 0 < learned["confidence"] < 1
    assert {cell["best"] for key, cell in shown.items() if key != tuple(KEY)} == {"single_node"}


def test_the_names_of_the_bins_are_those_of_the_edges() -> None:
    assert [len(names) for names in heat.NAMES.values()] == list(SHAPE[:4]) and len(ACTIONS) == SHAPE[4]
    assert heat.named(Observation(999_999, 9_999, 2, 0.0019).key) == {
        "complexity": "< 1M", "samples": "< 10k", "nodes": "<= 2", "latency": "< 2 ms"
    }  # fmt: skip
    assert heat.named(Observation(10**9, 10**5, 11, 0.03).key) == {
        "complexity": ">= 1B", "samples": ">= 100k", "nodes": "> 10", "latency": ">= 30 ms"
    }  # fmt: skip
    assert heat.named(Observation(10**8, 10**4, 10, 0.002).key) == {
        "complexity": "< 1B", "samples": "< 100k", "nodes": "<= 10", "latency": "< 30 ms"
    }  # fmt: skip
