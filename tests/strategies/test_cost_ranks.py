"""A node with several granted GPUs is several ranks, each on its own GPU."""

from __future__ import annotations

import pytest
from test_cost_strategies import GIB, ask, node

from protos.capacity import DeviceInfo
from protos.plan import NodeView, PlannedSubtask
from strategies.base import Inputs
from strategies.data_parallel import DataParallel
from strategies.links import ranks_of, trusted_groups
from strategies.single_node import SingleNode


def with_gpus(name: str, count: int, **changes: object) -> NodeView:
    devices = tuple(DeviceInfo("cuda", index, "T4", 16 * GIB, 16 * GIB, 0.0) for index in range(count))
    return node(name, gpus=devices, **changes)


def cut(inputs: Inputs) -> tuple[PlannedSubtask, ...]:
    return DataParallel().decompose(inputs, DataParallel().estimate(inputs))


def test_one_node_with_two_gpus_is_a_group_over_loopback() -> None:
    inputs = ask(with_gpus("box", 2, lan=None))
    subtasks = cut(inputs)
    assert DataParallel().estimate(inputs).network == "loopback"
    assert [(each.rank, each.node_id, each.device) for each in subtasks] == [(0, "box", 0), (1, "box", 1)]
    assert [each.data_range for each in subtasks] == [(0, 32), (32, 64)]


def test_every_granted_gpu_of_every_node_is_a_rank_of_its_own() -> None:
    subtasks = cut(ask(with_gpus("a", 2), with_gpus("b", 1), strategy="data_parallel"))
    assert sorted((each.node_id, each.device) for each in subtasks) == [("a", 0), ("a", 1), ("b", 0)]
    assert sorted(each.rank for each in subtasks) == [0, 1, 2]
    assert subtasks[-1].data_range[1] == 64


def test_a_node_without_a_gpu_or_with_one_is_one_rank_and_no_group_alone() -> None:
    for alone in (node("a"), with_gpus("a", 1)):
        assert ranks_of(alone) == 1
        assert trusted_groups([alone]) == ()
        assert DataParallel().feasible(ask(alone)) == ("needs 2 usable nodes, there is 1",)


def test_nodes_max_counts_nodes_not_ranks() -> None:
    many = (with_gpus("a", 2), with_gpus("b", 2), with_gpus("c", 2))
    used = {each.node_id for each in cut(ask(*many, nodes={"max": 2}))}
    assert len(used) == 2


@pytest.mark.parametrize("count", [1, 2, 4])
def test_single_node_uses_one_gpu_whatever_there_is(count: int) -> None:
    inputs = ask(with_gpus("a", count))
    (only,) = SingleNode().decompose(inputs, SingleNode().estimate(inputs))
    assert (only.rank, only.device, only.data_range) == (0, 0, (0, 64))
