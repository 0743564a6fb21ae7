"""A plan becomes one task per rank. Pure: the plan that was printed is what is cut; nothing is re-decided."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from protos.artifact import Manifest
from protos.ids import Fence, JobId
from protos.jobspec import JobSpec, entry_point
from protos.plan import Layout, Plan
from protos.work import Resume, Task, TaskKind

SHORTEST_COLLECTIVE_S = 10.0
LONGEST_COLLECTIVE_S = 60.0
STEPS_PER_COLLECTIVE = 10.0
SHARED_START_S = 20.0
LONGEST_SHARED_COLLECTIVE_S = 600.0


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the ranks fetch before they start; None where the job has no such file."""

    code: Manifest | None = None
    data: Manifest | None = None
    test: Manifest | None = None
    weights: Manifest | None = None
    data_digest: str | None = None  # of the training data as the job was identified with them


def collective_timeout_s(step_s: float, layout: Layout | None = None) -> float:
    """Ten predicted steps, at least 10 s (a first step is slow) and at most 60 s: a frozen peer shows only by this.

    Ranks that share the model wait within a step for each other's compute, the last stage of a pipeline for all others
    to be traced and filled: never less than three whole steps beside a slow start, however long they are.
    """
    timeout_s = min(LONGEST_COLLECTIVE_S, max(SHORTEST_COLLECTIVE_S, STEPS_PER_COLLECTIVE * step_s))
    if layout is None or not (layout.sharded or layout.tensor > 1 or len(layout.stages) > 1):
        return timeout_s
    return min(LONGEST_SHARED_COLLECTIVE_S, max(timeout_s, SHARED_START_S + 3 * step_s))


def decompose(
    plan: Plan, spec: JobSpec, job_id: JobId, fence: Fence, inputs: Inputs, resume: Resume | None = None
) -> tuple[Task, ...]:
    """In the order of the ranks; task i belongs to plan.subtasks[i].node_id."""
    subtasks = sorted(plan.subtasks, key=lambda subtask: subtask.rank)
    ranks = Counter(subtask.node_id for subtask in subtasks)
    # what a function returns may differ from call to call; the ranks of a group compare it among themselves
    data_digest = None if entry_point(spec.data.source) else inputs.data_digest
    slices = {
        subtask.rank if plan.layout is None else plan.layout.replica_of(subtask.rank): subtask.data_range
        for subtask in subtasks
    }
    samples = tuple(end - start for start, end in slices.values())
    return tuple(
        Task(
            kind=TaskKind.TRAIN,
            job_id=job_id,
            fence=fence,
            rank=subtask.rank,
            world_size=len(subtasks),
            strategy=plan.strategy,
            spec=spec,
            samples=samples,
            accumulate=subtask.accumulate,
            device=subtask.device,
            ranks_here=ranks[subtask.node_id],
            network=plan.coordination_plan.network,
            compression=plan.coordination_plan.compression,
            collective_timeout_s=collective_timeout_s(plan.estimate.step_s, plan.layout),
            deadline_s=plan.coordination_plan.deadline_s,
            code=inputs.code,
            data=inputs.data,
            test=inputs.test,
            weights=inputs.weights,
            resume=resume,
            layout=plan.layout,
            data_digest=data_digest,
        )
        for subtask in subtasks
    )
