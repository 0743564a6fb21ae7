"""Moving a job from state to state, only along protos.states.JOB_TRANSITIONS."""

from __future__ import annotations

from dataclasses import replace

from coordinator.control.state import JobView, Transition
from protos.errors import Blame, Conflict
from protos.states import JOB_TRANSITIONS, JobState, Reason


def to(job: JobView, state: JobState, reason: Reason = Reason.NONE, message: str = "", hint: str = "") -> JobView:
    """The job in another state. Raises Conflict for a transition that the table does not have."""
    if state is not job.state and state not in JOB_TRANSITIONS[job.state]:
        raise Conflict(f"{job.job_id} cannot go from {job.state} to {state}")
    if state is job.state:
        return replace(job, reason=reason, message=message, hint=hint)
    trail = (*job.trail, Transition(state, reason, message, hint))
    return replace(job, state=state, reason=reason, message=message, hint=hint, trail=trail)


def end(job: JobView, state: JobState, reason: Reason, message: str, hint: str, blame: Blame | None) -> JobView:
    """The job in a terminal state; what was wanted or waited for is over."""
    ended = to(job, state, reason, message, hint)
    return replace(ended, blame=blame, wanted=None, deadline_s=None, not_before_s=0.0)
