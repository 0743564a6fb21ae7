"""A plan becomes one task per rank. Pure: the plan that was printed is what is cut; nothing is re-decided."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from protos.artifact import Manifest
from protos.ids import Fence, JobId
from protos.jobspec import JobSpec, entry_point
from protos.plan import Layout, Plan
from protos.work import Resume, Task, TaskKind
from strategies.collective_deadline import planned_s


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the ranks fetch before they start; None where the job has no such file."""

    code: Manifest | None = None
    data: Manifest | None = None
    test: Manifest | None = None
    weights: Manifest | None = None
    data_digest: str | None = None  # of the training data as the job was identified with them


def collective_timeout_s(step_s: float, layout: Layout | None = None) -> float:
    """Until steps have been seen: of ranks that each hold the whole model, or of ones that share it."""
    shared = layout is not None and (layout.sharded or layout.tensor > 1 or len(layout.stages) > 1)
    return planned_s(step_s, shared)


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
