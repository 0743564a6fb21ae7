"""An old table counts by the order of its actions, once, and gives way to what is measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qtable import ranks
from qtable.backoff import PRIOR_DEVIATION, deviations, residuals
from qtable.state import ACTIONS, SHAPE, StateKey
from qtable.table import QTable

KEY = StateKey(1, 2, 1, 0)


def old(**values: float) -> np.ndarray:
    table = np.zeros(SHAPE)
    for action, value in values.items():
        table[(*KEY, ACTIONS.index(action))] = value
    return table


def imported(values: np.ndarray) -> QTable:
    table, found = QTable.fresh(np.zeros(SHAPE), 1, "a"), ranks.ranks_of(values)
    assert table.take(ranks.origin_of(found), ranks.contribution(found)) == bool(found)
    return table


def test_only_the_order_counts() -> None:
    small = ranks.ranks_of(old(data_parallel=0.3, single_node=0.1, federated=-5.0))
    assert small == ranks.ranks_of(old(data_parallel=9e9, single_node=1e-9, federated=-1e-9))
    assert list(small.values()) == [[0, None, None, 2, 1]]


def test_what_was_never_tried_has_no_rank_and_one_action_alone_says_nothing() -> None:
    assert ranks.ranks_of(np.zeros(SHAPE)) == {}
    assert ranks.ranks_of(old(data_parallel=0.3)) == {}
    assert ranks.ranks_of(old(data_parallel=0.3, single_node=0.3)) == {}


def test_a_rank_is_a_small_residual_with_the_weight_of_one_visit() -> None:
    table = imported(old(data_parallel=0.3, single_node=0.1, federated=-5.0))
    shares = table.residual()[KEY]
    assert shares == pytest.approx([0.05, 0.0, 0.0, -0.05, 0.0])
    assert table.n[KEY].tolist() == [1, 0, 0, 1, 1]
    table.learn(KEY, "data_parallel", -0.35)
    assert table.residual()[(*KEY, 0)] == pytest.approx((-0.35 + 0.05) / 2)


def test_an_old_table_decides_only_what_is_nearly_equal() -> None:
    """Even one that was tried everywhere moves no prediction by more than a tenth, and makes none seem surer."""
    table = imported(np.broadcast_to(np.array([5.0, 4.0, 3.0, 2.0, 1.0]), SHAPE).copy())
    assert max(abs(each) for each in residuals(table, KEY).values()) <= 0.1
    assert min(deviations(table, KEY).values()) >= 0.95 * PRIOR_DEVIATION


def test_the_same_order_is_imported_once_whatever_the_values() -> None:
    table, values = imported(old(data_parallel=0.3, single_node=0.1)), old(data_parallel=7.0, single_node=2.0)
    found = ranks.ranks_of(values)
    assert not table.take(ranks.origin_of(found), ranks.contribution(found))


@given(arrays.arrays(np.float64, SHAPE, elements=st.sampled_from([0.0, 0.5, -1.0, 2.0, 1e308, -1e-300])))
def test_every_table_gives_a_contribution_that_a_table_takes(values: np.ndarray) -> None:
    found = ranks.ranks_of(values)
    part = ranks.contribution(found)
    assert abs(part.residual).max() <= 2 * ranks.STEP + 1e-12
    assert part.residual.sum(axis=-1) == pytest.approx(0.0, abs=1e-12)
    for cell, row in found.items():
        residual = part.residual.reshape(-1, len(ACTIONS))[cell]
        for one, a in enumerate(row):
            for other, b in enumerate(row):
                if a is not None and b is not None:
                    assert (a < b) == (residual[one] > residual[other])


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 3, 4, 3)), np.zeros((4, 3, 4, 3, 6)), np.full(SHAPE, math.nan), np.full(SHAPE, math.inf)]
)
def test_another_shape_and_values_that_are_no_numbers_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"shape|finite"):
        ranks.ranks_of(wrong)


@pytest.mark.parametrize("wrong", [{144: [0, 1, None, None, None]}, {0: [0, 1]}, {0: [0, 2, None, None, None]}])
def test_ranks_that_no_table_has_are_refused(wrong: dict[int, list[int | None]]) -> None:
    with pytest.raises(ValueError, match="no ranks"):
        ranks.contribution(wrong)
