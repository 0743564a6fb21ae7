"""Who runs next: jobs in order of submission, those that were already running first, over the nodes that are idle."""

from __future__ import annotations

from dataclasses import replace

from coordinator.control import events as e
from coordinator.control.group import is_unfit, new_group
from coordinator.control.shape import shape_of
from coordinator.control.state import NO_FENCE, JobView, State, Timing
from coordinator.control.transitions import end
from protos.errors import Blame
from protos.ids import NodeId
from protos.plan import Plan
from protos.states import JobState, Reason


def schedule(state: State, now_s: float, plan_for: e.PlanFor, timing: Timing) -> tuple[State, list[e.Effect]]:
    """Start every queued job that can be placed now. A job that cannot says why and lets later ones pass only when it
    waits for nodes that are not there; one that waits for busy nodes keeps its turn."""
    effects: list[e.Effect] = []
    queued = sorted(
        (job for job in state.jobs.values() if job.state is JobState.QUEUED),
        key=lambda job: (job.fence == 0, job.order),
    )
    for job in queued:
        if now_s < job.not_before_s:
            if job.fence > NO_FENCE:
                break  # it goes on within seconds: later jobs do not take its nodes meanwhile
            continue
        idle = state.idle()
        if not idle and state.willing():
            state = state.with_job(_waits(job, Reason.WAITING_FOR_BUSY_NODES, "all nodes are busy with earlier jobs"))
            continue
        if job.next_plan is not None and _can_be(job, job.next_plan, idle):
            before = None if is_unfit(job) else job.plan
            job, offers = new_group(replace(job, plan=job.next_plan), now_s, timing)
            state, effects = state.with_job(replace(job, before=before)), [*effects, *offers]
            continue
        known = job.next_plan if job.next_plan is not None and is_unfit(job) else job.plan
        previous = known.strategy if known else None
        better = tuple(node_id for node_id in idle if node_id not in job.avoid)
        if not better and any(node_id not in job.avoid for node_id in state.willing()):
            why = "nodes that could not have it before are idle, the others are busy with earlier jobs"
            state = state.with_job(_waits(job, Reason.WAITING_FOR_BUSY_NODES, why))
            continue
        placed = plan_for(job.job_id, better or idle, state.willing(), _holders(job, better or idle), previous)
        if isinstance(placed, e.Unplaced) and better and better != idle:  # only the avoided ones can have it
            placed = plan_for(job.job_id, idle, state.willing(), _holders(job, idle), previous)
        if isinstance(placed, e.Unplaced):
            if placed.permanent:
                ended = end(job, JobState.FAILED, placed.reason, placed.message, placed.hint, Blame.POLICY)
                state, effects = state.with_job(ended), [*effects, e.Finish(job.job_id)]
                continue
            state = state.with_job(_waits(job, placed.reason, placed.message, placed.hint))
            if placed.reason is Reason.WAITING_FOR_BUSY_NODES:
                break
            continue
        if known is not None and shape_of(placed) in job.unfit:
            placed = _as_it_worked(job, known, placed, idle, state.willing(), plan_for)
        job, offers = new_group(replace(job, plan=placed), now_s, timing)
        state, effects = state.with_job(job), [*effects, *offers]
    return state, effects


def _as_it_worked(
    job: JobView, known: Plan, unfit: Plan, idle: tuple[NodeId, ...], willing: tuple[NodeId, ...], plan_for: e.PlanFor
) -> Plan:
    """Rather than a plan that could not begin: the one before it, or one over what is left of its nodes."""
    if shape_of(known) not in job.unfit and _can_be(job, known, idle):
        return known
    own = {subtask.node_id for subtask in known.subtasks}
    left = tuple(node_id for node_id in idle if node_id in own)
    placed = plan_for(job.job_id, left, willing, _holders(job, left), known.strategy) if left else unfit
    return unfit if isinstance(placed, e.Unplaced) else placed


def _can_be(job: JobView, plan: Plan, idle: tuple[NodeId, ...]) -> bool:
    """What was planned while the group before it ran: its nodes are free and fit, and the state comes with one."""
    nodes = {subtask.node_id for subtask in plan.subtasks}
    holders = _holders(job, idle)
    held = job.handed_over or not holders or not nodes.isdisjoint(holders)
    return nodes <= set(idle) and nodes.isdisjoint(job.avoid) and held


def _waits(job: JobView, reason: Reason, message: str, hint: str = "") -> JobView:
    if (job.reason, job.message, job.hint) == (reason, message, hint):
        return job
    return replace(job, reason=reason, message=message, hint=hint)


def _holders(job: JobView, idle: tuple[NodeId, ...]) -> tuple[NodeId, ...]:
    """Idle nodes that have the newest committed step of those that are here on disk."""
    here = [held for held in job.held if held.node_id in idle]
    newest = max((held.step for held in here), default=None)
    return tuple(held.node_id for held in here if held.step == newest)
