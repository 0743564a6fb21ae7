from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.decompose import Inputs, collective_timeout_s, decompose
from protos import documents
from protos.artifact import FileEntry, Manifest
from protos.ids import Digest, Fence, JobId, NodeId, PlanId
from protos.jobspec import JobSpec, parse
from protos.plan import CoordinationPlan, CostEstimate, Layout, Plan, PlannedSubtask
from protos.work import Resume, Task, TaskKind


def spec() -> JobSpec:
    return parse({"model": {"source": "m.py:f"}, "data": {"source": "d.npz"}, "train": {"batch_size": 64}})


def subtask(node: str, rank: int, start: int, end: int, accumulate: int = 1) -> PlannedSubtask:
    return PlannedSubtask("train", NodeId(node), rank, (start, end), (0, 1), (8,), (2,), accumulate=accumulate)


def plan(step_s: float = 2.0) -> Plan:
    coordination = CoordinationPlan("store over the session stream", "10.0.0.0/8", (), (), 150.0, 3, "fp16")
    estimate = CostEstimate(100.0, step_s, 0.0, {})
    subtasks = (subtask("b", 1, 48, 64, 2), subtask("a", 0, 0, 48))
    return Plan(PlanId("p-1"), "data_parallel", "", (), subtasks, coordination, estimate, (0, 0, 0, 0))


def test_every_rank_gets_the_whole_split_and_its_own_accumulation_in_rank_order() -> None:
    manifest = Manifest((FileEntry("model.py", Digest("0" * 64), 10),))
    resume = Resume(7, manifest)
    tasks = decompose(plan(), spec(), JobId("j-1"), Fence(3), Inputs(code=manifest, data=manifest), resume)
    assert [task.rank for task in tasks] == [0, 1]
    assert {task.samples for task in tasks} == {(48, 16)}
    assert [task.accumulate for task in tasks] == [1, 2]
    for task in tasks:
        assert (task.kind, task.world_size, task.fence, task.strategy) == (TaskKind.TRAIN, 2, 3, "data_parallel")
        assert (task.network, task.compression, task.deadline_s) == ("10.0.0.0/8", "fp16", 150.0)
        assert (task.code, task.data, task.test, task.weights, task.resume) == (manifest, manifest, None, None, resume)
        assert task.collective_timeout_s == 20.0
        assert documents.decode(Task, documents.encode(task)) == task


def test_the_ranks_are_told_which_data_were_identified_but_not_of_a_function() -> None:
    inputs = Inputs(data_digest="ab")
    assert {task.data_digest for task in decompose(plan(), spec(), JobId("j-1"), Fence(1), inputs)} == {"ab"}
    function = parse({"model": {"source": "m.py:f"}, "data": {"source": "d.py:load"}, "train": {"batch_size": 64}})
    assert {task.data_digest for task in decompose(plan(), function, JobId("j-1"), Fence(1), inputs)} == {None}


@pytest.mark.parametrize(
    ("step_s", "timeout_s"), [(0.001, 10.0), (1.0, 10.0), (3.0, 30.0), (15.0, 60.0), (200.0, 600.0)]
)
def test_a_collective_waits_for_ten_steps_within_bounds(step_s: float, timeout_s: float) -> None:
    assert collective_timeout_s(step_s) == timeout_s


def cut(layout: Layout, *subtasks: PlannedSubtask, step_s: float = 2.0) -> tuple[Task, ...]:
    made = replace(plan(step_s), subtasks=subtasks, layout=layout)
    return decompose(made, spec(), JobId("j-1"), Fence(1), Inputs())


def test_the_slices_of_a_pipeline_are_its_replicas() -> None:
    layout = Layout(((0, 1), (1, 2)), ("a",), 2)
    ranges = [(0, 48), (0, 48), (48, 64), (48, 64)]
    tasks = cut(layout, *(subtask(f"n{rank}", rank, *ranges[rank]) for rank in (3, 1, 0, 2)))
    assert {task.samples for task in tasks} == {(48, 16)}
    assert [task.samples[layout.replica_of(task.rank)] for task in tasks] == [48, 48, 16, 16]
    assert all(task.layout == layout and documents.decode(Task, documents.encode(task)) == task for task in tasks)


def test_ranks_that_cut_layers_take_one_slice_and_shards_one_each() -> None:
    tensor = cut(Layout(((0, 1),), tensor=2), subtask("a", 0, 0, 64), subtask("b", 1, 0, 64))
    assert {task.samples for task in tensor} == {(64,)}
    shards = cut(Layout(((0, 1),), sharded=True), subtask("a", 0, 0, 40), subtask("a", 1, 40, 64))
    assert {task.samples for task in shards} == {(40, 24)}
    assert {task.ranks_here for task in shards} == {2}


def test_ranks_that_share_a_model_wait_for_whole_steps_of_the_others() -> None:
    pipeline = Layout(((0, 1), (1, 2)), ("a",))
    assert collective_timeout_s(0.001, pipeline) == 20.0 + 3 * 0.001
    assert collective_timeout_s(100.0, pipeline) == 320.0
    assert collective_timeout_s(1e4, pipeline) == 20.0 + 3e4
    assert collective_timeout_s(1.0, Layout(((0, 1),), checkpoint_activations=True)) == 10.0
