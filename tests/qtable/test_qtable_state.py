from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protos.jobspec import StrategyName
from qtable.state import ACTIONS, SHAPE, Observation, StateKey


@pytest.mark.parametrize(
    ("parameters", "cell"),
    [(0, 0), (999_999, 0), (1_000_000, 1), (99_999_999, 1), (10**8, 2), (10**9 - 1, 2), (10**9, 3), (10**12, 3)],
)
def test_complexity_bins_are_closed_below(parameters: int, cell: int) -> None:
    assert Observation(parameters, 0, 1, 0.0).key.complexity == cell


@pytest.mark.parametrize(("rows", "cell"), [(0, 0), (9_999, 0), (10_000, 1), (99_999, 1), (100_000, 2), (10**9, 2)])
def test_sample_bins_are_closed_below(rows: int, cell: int) -> None:
    assert Observation(0, rows, 1, 0.0).key.samples == cell


@pytest.mark.parametrize(("nodes", "cell"), [(0, 0), (1, 0), (2, 0), (3, 1), (5, 1), (6, 2), (10, 2), (11, 3), (99, 3)])
def test_node_bins_are_closed_above(nodes: int, cell: int) -> None:
    assert Observation(0, 0, nodes, 0.0).key.nodes == cell


@pytest.mark.parametrize(
    ("rtt_s", "cell"), [(0.0, 0), (0.00199, 0), (0.002, 1), (0.0299, 1), (0.03, 2), (5.0, 2), (math.inf, 2)]
)
def test_latency_bins_are_closed_below(rtt_s: float, cell: int) -> None:
    assert Observation(0, 0, 1, rtt_s).key.latency == cell


@given(st.integers(0, 10**13), st.integers(0, 10**12), st.integers(0, 1000), st.floats(0, 100))
@example(10**6, 10**4, 2, 0.002)
@example(10**9, 10**5, 10, 0.03)
def test_every_observation_has_a_cell_and_bins_are_monotone(
    parameters: int, rows: int, nodes: int, rtt_s: float
) -> None:
    key = Observation(parameters, rows, nodes, rtt_s).key
    assert all(0 <= part < size for part, size in zip(key, SHAPE, strict=False))
    more = Observation(parameters + 1, rows + 1, nodes + 1, math.nextafter(rtt_s, math.inf)).key
    assert all(after - before in (0, 1) for before, after in zip(key, more, strict=True))


@pytest.mark.parametrize("wrong", [(-1, 0, 1, 0.0), (0, -1, 1, 0.0), (0, 0, 1, -1.0), (0, 0, 1, math.nan)])
def test_a_number_that_cannot_be_is_refused(wrong: tuple[int, int, int, float]) -> None:
    with pytest.raises(ValueError, match="observation"):
        _ = Observation(*wrong).key


def test_the_actions_are_the_strategies_of_a_job_file_in_their_order() -> None:
    assert tuple(name.value for name in StrategyName) == ACTIONS
    assert (4, 3, 4, 3, len(ACTIONS)) == SHAPE
    assert StateKey(3, 2, 3, 2) == Observation(10**10, 10**6, 20, 1.0).key
