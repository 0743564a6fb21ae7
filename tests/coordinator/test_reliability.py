"""How long nodes stay, from the log alone."""

from __future__ import annotations

import pytest

from coordinator.reliability import PRIOR_S, Reliability
from protos.ids import NodeId

A = NodeId("a")


def told(*events: tuple[float, str]) -> Reliability:
    made = Reliability()
    for time_s, link in events:
        made.apply(time_s, {"node_id": "a", "link": link})
    return made


def near(value: float) -> object:
    return pytest.approx(value, rel=0.1)  # in steps of a fifth


def test_a_node_of_which_nothing_is_known_counts_as_the_prior() -> None:
    assert Reliability().mtbf_s(A, 1e9) == near(PRIOR_S)


def test_a_node_that_stays_is_trusted_more_and_one_that_is_lost_less() -> None:
    steady = told((0.0, "CONNECTED"))
    lost = told((0.0, "CONNECTED"), (600.0, "LOST"), (700.0, "CONNECTED"), (1300.0, "LOST"))
    assert steady.mtbf_s(A, 10 * PRIOR_S) == near(11 * PRIOR_S)
    assert lost.mtbf_s(A, 2000.0) == near((PRIOR_S + 1200) / 3)


def test_leaving_and_a_short_cut_are_no_losses() -> None:
    made = told((0.0, "CONNECTED"), (100.0, "DISCONNECTED"), (101.0, "CONNECTED"), (500.0, "LEFT"))
    assert made.mtbf_s(A, 1e6) == near(PRIOR_S + 500)
