"""Contributions put together: exact counts and moments, the same table whoever imports from whom, nothing twice."""

from __future__ import annotations

import copy
import json
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtable import snapshot
from qtable.contribution import PARTS, Contribution
from qtable.policy import Ledger
from qtable.state import ACTIONS, SHAPE, StateKey
from qtable.table import ARRAYS, MOST_ORIGINS, QTable

KEY = StateKey(1, 2, 1, 0)
KEYS = [KEY, StateKey(0, 0, 0, 0), StateKey(3, 2, 3, 2)]
Rewards = list[tuple[int, int, float]]
REWARDS = st.lists(
    st.tuples(st.integers(0, len(KEYS) - 1), st.integers(0, len(ACTIONS) - 1), st.floats(-2, 2)), max_size=25
)


def learned(origin: str, rewards: Rewards) -> QTable:
    table = QTable.fresh(np.full(SHAPE, -0.3), 1, origin)
    for key, action, value in rewards:
        table.learn(KEYS[key], ACTIONS[action], value)
        table.last_seq += 1
    return table


def carried(table: QTable) -> QTable:
    """Through a file, as an export is."""
    return snapshot.parse(json.dumps(snapshot.document(table, Ledger())))[0]


def merge(into: QTable, other: QTable) -> None:
    for origin, part in carried(other).contributions().items():
        into.take(origin, part)


def same(one: QTable, other: QTable) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


@settings(max_examples=40)
@given(REWARDS, REWARDS, REWARDS)
def test_whoever_imports_from_whom_and_in_whatever_order_the_table_is_the_same(
    first: Rewards, second: Rewards, third: Rewards
) -> None:
    a, b, c = learned("a", first), learned("b", second), learned("c", third)
    before = copy.deepcopy((a, b, c))
    merge(a, before[1])
    merge(a, before[2])
    merge(b, before[2])
    merge(b, before[0])
    assert same(a, b)
    merge(c, a)
    assert same(a, c), "what a heard of b comes along, and c's own experience does not come back to it"
    again = copy.deepcopy(a)
    merge(a, b)
    merge(a, before[1])
    assert same(a, again), "nothing counts twice"


@settings(max_examples=40)
@given(REWARDS, REWARDS)
def test_counts_means_and_squares_of_a_merge_are_those_of_all_rewards_together(first: Rewards, second: Rewards) -> None:
    a, b = learned("a", first), learned("b", second)
    merge(a, b)
    for key in range(len(KEYS)):
        for action in range(len(ACTIONS)):
            rewards = [value for k, act, value in [*first, *second] if (k, act) == (key, action)]
            index = (*KEYS[key], action)
            assert a.n[index] == len(rewards)
            if rewards:
                assert a.mean[index] == pytest.approx(statistics.fmean(rewards), abs=1e-9)
                spread = sum((value - statistics.fmean(rewards)) ** 2 for value in rewards)
                assert a.m2[index] == pytest.approx(spread, abs=1e-9)


def test_residuals_weigh_by_visits() -> None:
    a = learned("a", [(0, 0, 1.0)] * 3)
    merge(a, learned("b", [(0, 0, -1.0)]))
    assert a.residual()[(*KEY, 0)] == pytest.approx((3 * 1.0 - 1.0) / 4)
    assert a.visits(KEY, ACTIONS[0]) == 4


def test_one_contribution_alone_is_the_table_to_the_last_bit() -> None:
    alone, moved = learned("a", [(0, 0, 0.1), (0, 0, 0.2), (0, 0, 0.7)]), learned("b", [])
    merge(moved, alone)
    assert same(alone, moved)


def test_a_later_export_of_an_origin_takes_the_place_of_the_earlier_one_and_an_earlier_one_changes_nothing() -> None:
    other = learned("b", [(0, 0, 1.0)])
    early, a = carried(other), learned("a", [])
    other.learn(KEY, ACTIONS[0], -1.0)
    other.last_seq += 1
    merge(a, other)
    assert a.visits(KEY, ACTIONS[0]) == 2
    assert not any(a.take(origin, part) for origin, part in early.contributions().items())
    assert a.visits(KEY, ACTIONS[0]) == 2


def test_learning_goes_on_beside_what_was_imported() -> None:
    a, b = learned("a", [(0, 0, 0.5)]), learned("b", [(0, 0, -0.5), (1, 1, 1.0)])
    merge(a, b)
    a.learn(KEY, ACTIONS[0], 0.7)
    a.last_seq += 1
    afresh = learned("a", [(0, 0, 0.5), (0, 0, 0.7)])
    merge(afresh, b)
    assert same(a, afresh)
    assert same(carried(a), a)


def edited(**changes: Any) -> Contribution:
    cells = learned("a", [(0, 0, 0.5), (0, 0, 0.1)]).contributions()["a"].cells()
    return Contribution.of_cells(changes.pop("seq", 1), cells | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n": [-1.0]}, "negative"),
        ({"n": [0.5]}, "whole"),
        ({"n": [1e300]}, "above"),
        ({"n": [2.0, 3.0]}, "one number per cell"),
        ({"n": None}, "one number per cell|wrong type"),
        ({"n": ["x"]}, "could not convert"),
        ({"n": [0.0]}, "larger than rewards|never visited"),
        ({"residual": [2.5]}, "beyond"),
        ({"residual": [float("nan")]}, "not finite"),
        ({"mean": [-9.0]}, "beyond"),
        ({"m2": [1e9]}, "larger than rewards"),
        ({"cell": [720]}, "not of this table"),
        ({"cell": [-1]}, "not of this table"),
        ({"cell": [1, 1], **{name: [1.0, 1.0] for name in PARTS}}, "named twice"),
        ({"cell": "no"}, "invalid literal"),
        ({"seq": -1}, "seq is negative"),
        ({"seq": 2**63}, "larger than any log"),
    ],
)
def test_numbers_that_rewards_cannot_give_are_refused(changes: dict[str, Any], said: str) -> None:
    assert edited().visits == 2
    with pytest.raises(ValueError, match=said):
        edited(**changes)


def test_a_table_holds_so_many_origins_and_each_has_a_name() -> None:
    table = learned("a", [])
    for number in range(MOST_ORIGINS - 1):
        assert table.take(f"o-{number}", edited())
    with pytest.raises(ValueError, match="the most is"):
        table.take("one-more", edited())
    assert table.take("o-0", edited(seq=2)), "a later one of a known origin has its place"
    for name in ("", "x" * 101, "\x1b[2J", "a b"):
        with pytest.raises(ValueError, match="names its origin"):
            learned("a", []).take(name, edited())
