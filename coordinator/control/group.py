"""The life of one generation of a job's group: reports, losses, holding the survivors, and what follows."""

from __future__ import annotations

from dataclasses import replace

from coordinator.control import events as e
from coordinator.control.shape import shape_of
from coordinator.control.state import AttemptView, Generation, Held, JobView, State, Timing
from coordinator.control.transitions import end, to
from protos.errors import Blame
from protos.ids import JobId, NodeId
from protos.plan import Plan
from protos.states import ATTEMPT_TRANSITIONS, AttemptState, JobState, Reason, StopMode
from protos.work import Fault

Effects = list[e.Effect]


def take_report(state: State, event: e.AttemptReported, now_s: float, timing: Timing) -> tuple[State, Effects, str]:
    """A node's word on one rank. Only the current fence, the planned node and a forward transition count."""
    job = state.jobs.get(event.job_id)
    ends = event.state in (AttemptState.DONE, AttemptState.FAILED)
    if job is None or job.ended or job.fence != event.fence:
        if job is not None and not job.ended and event.outcome is not None and event.outcome.held_step is not None:
            state = state.with_job(_hold(job, Held(event.node_id, event.outcome.held_step)))
        old: Effects = (
            [] if ends else [e.Stop(event.node_id, event.job_id, event.fence, StopMode.CANCEL, "an older group")]
        )
        return state, old, f"fenced off: {event.job_id} is not at fence {event.fence}"
    attempt = next((a for a in job.attempts if a.rank == event.rank and a.node_id == event.node_id), None)
    if attempt is None or event.state not in ATTEMPT_TRANSITIONS[attempt.state]:
        if event.outcome is not None and event.outcome.held_step is not None:
            state = state.with_job(_hold(job, Held(event.node_id, event.outcome.held_step)))
        return state, [], "already known"
    attempts = tuple(
        replace(a, state=event.state, outcome=event.outcome or a.outcome) if a is attempt else a for a in job.attempts
    )
    job = replace(job, attempts=attempts)
    if event.outcome is not None:
        if event.outcome.held_step is not None:
            job = _hold(job, Held(event.node_id, event.outcome.held_step))
        if event.outcome.step > job.step:
            job = replace(job, step=event.outcome.step, samples=event.outcome.samples)
    if job.step > job.fence_step:
        job = replace(job, retries=0)
    effects: Effects = []
    if event.state is AttemptState.FAILED:
        job, effects = _after_fault(job, event, now_s, timing)
    elif job.state is JobState.STARTING and all(a.state in _STARTED for a in job.attempts):
        if job.wanted is None:
            job = replace(to(job, JobState.RUNNING, Reason.TRAINING, _where(state, job)), deadline_s=None)
        else:  # what the user asked for stays the reason: a coordinator that restarts reads it there
            job = to(job, JobState.RUNNING, job.reason, job.message)
    if event.rank == 0 and event.state is AttemptState.DONE:
        job = replace(job, deadline_s=now_s + timing.stop_s)
    return state.with_job(job), effects, f"rank {event.rank} {event.state.value.lower()}"


_STARTED = frozenset({AttemptState.READY, AttemptState.RUNNING, AttemptState.DONE})


def _where(state: State, job: JobView) -> str:
    names = [state.nodes[a.node_id].name if a.node_id in state.nodes else a.node_id for a in job.attempts]
    return f"training on {', '.join(names)}"


def _hold(job: JobView, held: Held) -> JobView:
    """The highest step counts, as in recovery: the ranks of a node share a disk, and end up to a step apart."""
    known = [other.step for other in job.held if other.node_id == held.node_id]
    newest = Held(held.node_id, max([held.step, *known]))
    return replace(job, held=(*(other for other in job.held if other.node_id != held.node_id), newest))


def _after_fault(job: JobView, event: e.AttemptReported, now_s: float, timing: Timing) -> tuple[JobView, Effects]:
    fault = event.outcome.fault if event.outcome else None
    if job.wanted is not None or _finished(job):
        return job, []
    if not _began(job):
        return _go_back(job, fault.message if fault else f"rank {event.rank} failed", now_s, timing)
    if fault is not None and not fault.retryable:
        stops = _stop_working(job, StopMode.CANCEL, fault.message)
        ended = end(job, JobState.FAILED, fault.reason, fault.message, fault.hint, fault.blame)
        return ended, [*stops, e.CloseRendezvous(job.job_id, job.fence), e.Finish(job.job_id)]
    if fault is None:
        return _recover(job, Reason.PEER_LOST, f"rank {event.rank} failed", now_s, timing)
    if _elsewhere(fault):
        job = replace(job, avoid=job.avoid | {event.node_id})
    return _recover(job, fault.reason, fault.message, now_s, timing, fault.hint)


def _elsewhere(fault: Fault) -> bool:
    """Whether a retryable fault lies in what this node has or lacks: disk, memory, the job's data, a package."""
    return fault.reason in (Reason.DISK_FULL, Reason.OUT_OF_MEMORY) or fault.lacking


def regroup(job: JobView, plan: Plan, message: str, now_s: float, timing: Timing) -> tuple[JobView, Effects]:
    """The ranks stop and a new group forms under `plan`, without anything having gone wrong.

    Whole states stay on the disks of those that go on. Parts, and a state that nobody of the new group has, are
    uploaded first: on the disks where they lie they would be of no use to it.
    """
    stays = {attempt.node_id for attempt in job.working} & {subtask.node_id for subtask in plan.subtasks}
    whole = job.plan is not None and job.plan.layout is None
    mode, bound_s = (StopMode.HOLD, timing.hold_s) if whole and stays else (StopMode.PAUSE, timing.hand_over_s)
    stops = _stop_working(job, mode, message)
    job = to(job, JobState.RECOVERING, Reason.REPLANNED, message)
    job = replace(job, next_plan=plan, handed_over=mode is StopMode.PAUSE, revisions=job.revisions + 1)
    return replace(job, deadline_s=now_s + bound_s), stops


def _go_back(job: JobView, why: str, now_s: float, timing: Timing) -> tuple[JobView, Effects]:
    """A plan that a healthy group gave way to could not begin: that group forms again, and it is not tried any more."""
    if job.state is JobState.RECOVERING or job.plan is None or job.before is None:
        return job, []
    stops, failed = _stop_working(job, StopMode.HOLD, why), job.plan
    back = replace(job.before, trials=())
    job = to(job, JobState.RECOVERING, Reason.REPLANNED, f"{failed.strategy} could not begin ({why}): back as before")
    job = replace(job, next_plan=back, handed_over=True, before=None, unfit=job.unfit | {shape_of(failed)})
    return replace(job, deadline_s=now_s + timing.hold_s), stops


def _began(job: JobView) -> bool:
    """Whether this group has committed a step; else there may be a plan to go back to."""
    return job.before is None or job.step > job.fence_step


def hand_over(job: JobView, node_id: NodeId, message: str, now_s: float, timing: Timing) -> tuple[JobView, Effects]:
    """A node is about to go, or to work no more: the job goes on without it, and its newest state must not go with it.

    The node's ranks upload what they hold before they end. Where ranks hold parts of the model all of them do: on the
    disks of those that stay a part is of no use without the others. Elsewhere the others have the whole state there.
    """
    leaving = [a for a in job.working if a.node_id == node_id]
    if not leaving or job.wanted is not None or _finished(job):
        return job, []  # it ends, or all of its ranks hand over already
    deadline_s = now_s + timing.hand_over_s
    if job.state is JobState.RECOVERING:  # the others were told already
        job = replace(job, deadline_s=max(deadline_s, job.deadline_s or 0.0))
        return job, [e.Stop(a.node_id, job.job_id, job.fence, StopMode.PAUSE, message) for a in leaving]
    parts = job.plan is not None and job.plan.layout is not None
    stops: Effects = [
        e.Stop(
            attempt.node_id,
            job.job_id,
            job.fence,
            StopMode.PAUSE if parts or attempt.node_id == node_id else StopMode.HOLD,
            message,
        )
        for attempt in job.working
    ]
    job = to(job, JobState.RECOVERING, Reason.NODE_LEFT, message)
    return replace(job, deadline_s=deadline_s), stops


def _recover(
    job: JobView, reason: Reason, message: str, now_s: float, timing: Timing, hint: str = ""
) -> tuple[JobView, Effects]:
    """Ask the survivors to hold. Called again while recovering it only adds nothing."""
    if job.state is JobState.RECOVERING:
        return job, []
    stops = _stop_working(job, StopMode.HOLD, message)
    job = to(job, JobState.RECOVERING, reason, message, hint)
    return replace(job, deadline_s=now_s + timing.hold_s), stops


def _stop_working(job: JobView, mode: StopMode, why: str) -> Effects:
    return [e.Stop(attempt.node_id, job.job_id, job.fence, mode, why) for attempt in job.working]


def lose_attempts(
    state: State, job_id: JobId, ranks: list[int], reason: Reason, message: str, now_s: float, timing: Timing
) -> tuple[State, Effects]:
    """Ranks of the current fence whose node is gone, or did not answer in time."""
    job = state.jobs[job_id]
    job = replace(
        job,
        attempts=tuple(
            replace(a, state=AttemptState.LOST) if a.rank in ranks and not a.ended else a for a in job.attempts
        ),
    )
    effects: Effects = []
    if job.wanted is None and not _finished(job):
        if _began(job):
            job, effects = _recover(job, reason, message, now_s, timing)
        else:
            job, effects = _go_back(job, message, now_s, timing)
    return state.with_job(job), effects


def _finished(job: JobView) -> bool:
    """Rank 0 has delivered the result: the others' absence no longer matters."""
    return any(a.rank == 0 and a.state is AttemptState.DONE for a in job.attempts)


def continue_recovery(state: State, job_id: JobId, now_s: float, timing: Timing) -> tuple[State, Effects]:
    """When every rank of the generation has ended: success, the end that was wanted, another try, or failure."""
    job = state.jobs[job_id]
    if job.ended or not job.attempts or job.working or job.state in (JobState.QUEUED, JobState.PAUSED):
        return state, []
    close = e.CloseRendezvous(job.job_id, job.fence)
    if _finished(job):
        ended = end(job, JobState.SUCCEEDED, Reason.FINISHED, "finished", "", None)
        return state.with_job(ended), [close, e.Finish(job_id)]
    job = replace(job, deadline_s=None)
    if job.wanted is StopMode.CANCEL:
        ended = end(job, JobState.CANCELLED, Reason.CANCELLED_BY_USER, "cancelled by its user", "", None)
        return state.with_job(ended), [close, e.Finish(job_id)]
    if job.wanted is StopMode.PAUSE:
        paused = to(job, JobState.PAUSED, Reason.PAUSED_BY_USER, "paused; hive resume lets it go on")
        return state.with_job(replace(forget_change(paused), wanted=None)), [close]
    if job.state is not JobState.RECOVERING:
        job = to(job, JobState.RECOVERING, Reason.PEER_LOST, job.message)
    if job.retries >= timing.retries:
        message = f"gave up after {timing.retries} tries without a step in between: {job.message}"
        hint = job.hint or "hive logs shows what the workers printed; hive nodes shows who is there"
        ended = end(job, JobState.FAILED, Reason.RETRIES_EXHAUSTED, message, hint, _blame(job))
        return state.with_job(ended), [close, e.Finish(job_id)]
    wait_s = timing.backoff_s(job.retries)
    cause = job.message
    if job.reason is Reason.REPLANNED and job.plan is not None:
        left = Generation(job.plan, job.fence, job.fence_step, job.attempts)
        job = replace(to(job, JobState.QUEUED, Reason.REPLANNED, cause), not_before_s=now_s, left=left)
        return state.with_job(job), [close]
    restarted = job.reason is Reason.COORDINATOR_RESTARTED  # not the group's failure
    job = to(job, JobState.QUEUED, Reason.BACKING_OFF, f"{cause}; forming a new group in {wait_s:.0f} s")
    job = replace(job, not_before_s=now_s + wait_s, retries=job.retries + (not restarted))
    return state.with_job(job), [close]


def _blame(job: JobView) -> Blame:
    """Of the fault that the job names; the other ranks were only asked to stop."""
    faults = [attempt.outcome.fault for attempt in job.attempts if attempt.outcome and attempt.outcome.fault]
    named = [fault for fault in faults if fault.reason is job.reason]
    return next((fault.blame for fault in [*named, *faults]), Blame.NODE)


def forget_change(job: JobView) -> JobView:
    """The change of plan that was under way is off; what could not begin is not what the job goes on with."""
    known = job.next_plan if is_unfit(job) and job.next_plan is not None else job.plan
    return replace(job, plan=known, next_plan=None, before=None)


def is_unfit(job: JobView) -> bool:
    """Whether its plan is one that could not begin: it is about to be given up for the one before."""
    return job.plan is not None and shape_of(job.plan) in job.unfit


def offers_again(job: JobView, ranks: list[int]) -> Effects:
    return [e.Offer(a.node_id, job.job_id, job.fence, a.rank) for a in job.attempts if a.rank in ranks]


def new_group(job: JobView, now_s: float, timing: Timing) -> tuple[JobView, Effects]:
    """The next fence: one OFFERED attempt per planned subtask."""
    plan = job.plan
    if plan is None:
        raise ValueError("a group needs a plan")
    fence = type(job.fence)(job.fence + 1)
    attempts = tuple(AttemptView(s.rank, s.node_id, AttemptState.OFFERED) for s in plan.subtasks)
    job = to(job, JobState.STARTING, Reason.RENDEZVOUS, "forming the group")
    job = replace(
        job,
        fence=fence,
        fence_step=job.step,
        attempts=attempts,
        next_plan=None,
        handed_over=False,
        before=None,
        deadline_s=now_s + max(timing.start_s, plan.coordination_plan.deadline_s),
    )
    return job, [e.Offer(a.node_id, job.job_id, fence, a.rank) for a in attempts]
