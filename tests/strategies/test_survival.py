"""What losses of nodes cost a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as some
from test_cost_strategies import node  # the nodes of the planner's tests

from protos.plan import Layout, NodeView
from strategies.survival import LEAST, RESTART_S, efficiency

STAGES = Layout(((0, 1), (1, 2)), ("a",))
HOUR_S = 3600.0


def nodes(*mtbf_s: float | None) -> list[NodeView]:
    return [replace(node(f"n{index}"), mtbf_s=value) for index, value in enumerate(mtbf_s)]


def test_nodes_that_are_never_lost_cost_nothing() -> None:
    assert efficiency(nodes(None, None), STAGES, 60.0) == 1.0


def test_a_loss_costs_a_group_of_whole_models_the_restart_and_others_the_steps_since_a_checkpoint() -> None:
    pair = nodes(HOUR_S, HOUR_S)
    assert efficiency(pair, None, 60.0) == pytest.approx(1 - 2 / HOUR_S * RESTART_S)
    assert efficiency(pair[:1], None, 60.0) == pytest.approx(1 - 1 / HOUR_S * (RESTART_S + 30))
    assert efficiency(pair, STAGES, 60.0) == pytest.approx(1 - 2 / HOUR_S * (RESTART_S + 90))


def test_ranks_of_one_node_are_lost_together() -> None:
    one = nodes(HOUR_S)
    assert efficiency(one * 3, None, 60.0) == efficiency(one, None, 60.0)


@given(some.lists(some.floats(1.0, 1e9), min_size=1, max_size=8), some.floats(0.1, 1e4))
def test_it_is_a_share(mtbf_s: list[float], every_s: float) -> None:
    assert LEAST <= efficiency(nodes(*mtbf_s), STAGES, every_s) <= 1.0
