"""A running job takes another plan: a better one was found while it ran, or the next is tried out.

What is better was worked out beside the control loop (coordinator/review.py), with what was true then: here it is taken
only if it still can be. Jobs that wait for a node come first.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.control import events as e
from coordinator.control.group import regroup
from coordinator.control.state import JobView, State, Timing
from protos.ids import Fence, JobId
from protos.states import JobState


def revised(state: State, event: e.Revised, now_s: float, timing: Timing) -> tuple[State, list[e.Effect], str]:
    job = _running(state, event.job_id, event.fence)
    if job is None:
        return state, [], "revised too late"
    own = {attempt.node_id for attempt in job.attempts}
    planned = {subtask.node_id for subtask in event.plan.subtasks}
    if not own <= set(state.willing()):
        return state, [], "not revised: one of its nodes is about to go, and the group forms again anyway"
    if not planned - own <= set(state.idle()) - job.avoid:
        return state, [], "not revised: a node of the other plan is not free any more"
    if planned - own and any(other.state is JobState.QUEUED for other in state.jobs.values()):
        return state, [], "not revised: another job waits for a node"
    job, stops = regroup(job, event.plan, event.message, now_s, timing)
    return state.with_job(job), stops, event.message


def settled(state: State, event: e.Settled) -> tuple[State, list[e.Effect], str]:
    job = _running(state, event.job_id, event.fence)
    if job is None or job.plan is None:
        return state, [], "settled too late"
    return state.with_job(replace(job, plan=replace(job.plan, trials=()))), [], "its plan stays"


def _running(state: State, job_id: JobId, fence: Fence) -> JobView | None:
    """The job while nothing else is under way with this group."""
    job = state.jobs.get(job_id)
    if job is None or job.fence != fence or job.state is not JobState.RUNNING or job.wanted is not None:
        return None
    return None if any(attempt.ended for attempt in job.attempts) else job
