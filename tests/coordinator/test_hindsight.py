"""What a choice looks like once the job ran, from the events of one job."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coordinator.cli.plan_view import hindsight as shown
from coordinator.hindsight import hindsight


def decision(plan_id: str, **seconds: float) -> tuple[str, dict[str, Any]]:
    candidates = [
        {"strategy": name, "seconds": value, "residual": 0.1, "deviation": 0.2, "nodes": ["n-1", "n-1", "n-2"]}
        for name, value in seconds.items()
    ]
    return "decision", {"plan_id": plan_id, "candidates": [*candidates, {"strategy": "federated", "seconds": None}]}


def lesson(
    kind: str, plan_id: str, strategy: str, measured_s: float, counted: bool = True
) -> tuple[str, dict[str, Any]]:
    return kind, {
        "plan_id": plan_id, "strategy": strategy, "steps": 40, "predicted_step_s": 0.1, "measured_step_s": 0.2,
        "measured_s": measured_s, "counted": counted, "why": "" if counted else "the job did not run to its end",
    }  # fmt: skip


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
    events: list[tuple[str, dict[str, Any]]],
) -> None:
    assert hindsight(events)["regret"] is None


def test_a_choice_that_was_right_has_none() -> None:
    seen = hindsight([EVENTS[2], lesson("outcome", "p-2", "single_node", 11.0)])
    assert seen["regret"]["regret_s"] == 0.0


def test_people_see_the_groups_by_the_names_of_nodes() -> None:
    text = shown(hindsight(EVENTS), {"n-1": "laptop", "n-2": "gaming-pc"})
    assert "laptop, gaming-pc" in text and "gave way to the next" in text and "finished the job" in text
    assert "data_parallel was expected to take" in text
    assert shown({}, {}) == ""
