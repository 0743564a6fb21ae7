"""What a choice looks like once the job ran, from the events of one job."""

from __future__ import annotations

import math

import pytest

from coordinator.cli.plan_view import hindsight as shown
from coordinator.hindsight import MOST_DECISIONS, Told, hindsight


def decision(plan_id: str, **seconds: float) -> Told:
    candidates = [
        {"strategy": name, "seconds": value, "residual": 0.1, "deviation": 0.2, "nodes": ["n-1", "n-1", "n-2"]}
        for name, value in seconds.items()
    ]
    payload = {
        "plan_id": plan_id,
        "strategy": min(seconds, key=lambda name: seconds[name]),
        "reason": f"why {plan_id}",
        "candidates": [*candidates, {"strategy": "federated", "seconds": None, "reasons": ["not built yet"]}],
        "predicted_s": 10.0,
        "loss_if_wrong_s": 3.0,
        "trials": ["data_parallel", "single_node"] if plan_id == "p-1" else [],
        "trial_steps": 30 if plan_id == "p-1" else 0,
        "propensity": 0.05,
        "forced": False,
        "explored": True,
        "expected_loss_s": 0.4,
        "state": [1, 0, 2, 3],
        "features": {"parameters": 7},
        "cost_model_version": 9,
    }
    return Told("decision", 0.0, payload)


def lesson(
    kind: str, plan_id: str, strategy: str, measured_s: float, counted: bool = True, step_s: float = 0.2
) -> Told:
    payload = {
        "plan_id": plan_id, "strategy": strategy, "steps": 40, "predicted_step_s": 0.1, "measured_step_s": step_s,
        "measured_s": measured_s, "counted": counted, "why": "" if counted else "the job did not run to its end",
    }  # fmt: skip
    return Told(kind, 0.0, payload)


def became(state: str, at_s: float, reason: str = "") -> Told:
    return Told("job", at_s, {"state": state, "reason": reason})


EVENTS = [
    decision("p-1", data_parallel=10.0, single_node=12.0),
    lesson("trial", "p-1", "data_parallel", 20.0),
    decision("p-2", data_parallel=20.0, single_node=12.0),
    lesson("outcome", "p-2", "single_node", 30.0),
]


def test_the_groups_stand_in_their_order_and_regret_is_against_the_best_other_as_corrected() -> None:
    seen = hindsight(EVENTS)
    assert [(group["strategy"], group["finished"]) for group in seen["groups"]] == [
        ("data_parallel", False),
        ("single_node", True),
    ]
    assert seen["groups"][0]["nodes"] == ["n-1", "n-2"]
    other_s = 20.0 * math.exp(-0.1)
    assert seen["regret"]["best_other"] == "data_parallel"
    assert seen["regret"]["best_other_s"] == pytest.approx(other_s)
    assert seen["regret"]["regret_s"] == pytest.approx(30.0 - other_s)


@pytest.mark.parametrize(
    "events",
    [
        EVENTS[:3],
        [EVENTS[0], lesson("outcome", "p-1", "data_parallel", 20.0, counted=False)],
        [decision("p-1", single_node=12.0), lesson("outcome", "p-1", "single_node", 12.0)],
    ],
)
def test_without_an_end_a_measure_or_an_alternative_there_is_no_regret(
    events: list[Told],
) -> None:
    assert hindsight(events)["regret"] is None


def test_a_choice_that_was_right_has_none() -> None:
    seen = hindsight([EVENTS[2], lesson("outcome", "p-2", "single_node", 11.0)])
    assert seen["regret"]["regret_s"] == 0.0


def test_what_trials_and_changes_of_plan_took_is_part_of_the_regret() -> None:
    """1. A trial of 40 steps, 0.1 s longer each than those of the group that finished. 2. It gives way within 2 s. 3. A
    loss of a node and a pause are no changes of plan."""
    seen = hindsight(
        [
            EVENTS[0],
            became("RUNNING", 100.0),
            became("RECOVERING", 110.0, "replanned"),
            became("QUEUED", 110.5, "replanned"),
            lesson("trial", "p-1", "data_parallel", 20.0, step_s=0.3),
            EVENTS[2],
            became("STARTING", 111.0, "rendezvous"),
            became("RUNNING", 112.0),
            became("RECOVERING", 120.0, "node_lost"),
            became("RUNNING", 130.0),
            became("RECOVERING", 140.0, "replanned"),
            became("PAUSED", 141.0),
            became("RUNNING", 1000.0),
            EVENTS[3],
        ]
    )["regret"]
    assert seen["earlier_groups_s"] == pytest.approx(40 * 0.1)
    assert seen["switching_s"] == pytest.approx(2.0)
    assert seen["regret_s"] == pytest.approx(30.0 + 4.0 + 2.0 - 20.0 * math.exp(-0.1))
    text = shown({"regret": seen}, {})
    assert "steps of earlier groups took 4" in text and "changes of group took 2" in text


def test_every_decision_is_told_with_what_it_was_made_from() -> None:
    first, second = hindsight(EVENTS)["decisions"]
    assert (first["plan_id"], first["strategy"], first["reason"]) == ("p-1", "data_parallel", "why p-1")
    assert (first["expected_loss_s"], first["trials"], first["trial_steps"]) == (
        3.0,
        ["data_parallel", "single_node"],
        30,
    )
    assert [each["strategy"] for each in first["candidates"]] == ["data_parallel", "single_node", "federated"]
    assert first["candidates"][2]["reasons"] == ["not built yet"]
    assert (second["strategy"], second["trials"]) == ("single_node", [])
    text = shown(hindsight(EVENTS), {})
    assert text.index("DECISION 1: data_parallel") < text.index("why p-1") < text.index("DECISION 2: single_node")
    assert "data_parallel, then single_node: 30 steps each" in text and "are lost on average" in text
    assert "not built yet" in text


def test_a_decision_says_how_it_was_drawn_what_that_may_cost_and_which_cell_it_is_of() -> None:
    (told,) = hindsight(EVENTS[:1])["decisions"]
    assert (told["propensity"], told["forced"], told["explored"], told["explored_loss_s"]) == (0.05, False, True, 0.4)
    assert (told["state"], told["features"], told["cost_model_version"]) == ([1, 0, 2, 3], {"parameters": 7}, 9)
    older = Told("decision", 0.0, {"plan_id": "p-0"})
    assert hindsight([older])["decisions"][0]["propensity"] is None


def test_one_decision_without_trials_is_the_plan_that_is_shown_anyway() -> None:
    assert "DECISION" not in shown(hindsight([EVENTS[2]]), {})


def test_of_very_many_decisions_the_first_and_the_newest_are_shown() -> None:
    seen = hindsight([decision(f"p-{at}", single_node=1.0) for at in range(MOST_DECISIONS + 5)])
    assert [each["plan_id"] for each in seen["decisions"][:2]] == ["p-0", "p-6"]
    assert (len(seen["decisions"]), seen["decisions_left_out"]) == (MOST_DECISIONS, 5)
    assert "DECISION 7: single_node\nbecause   why p-6" in shown(seen, {})


def test_people_see_the_groups_by_the_names_of_nodes() -> None:
    text = shown(hindsight(EVENTS), {"n-1": "laptop", "n-2": "gaming-pc"})
    assert "laptop, gaming-pc" in text and "gave way to the next" in text and "finished the job" in text
    assert "data_parallel was expected to take" in text
    assert shown({}, {}) == ""
