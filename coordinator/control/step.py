"""One step of the control loop: an event in, the next state, the effects and the reason out. Pure.

Invariants (checked by the simulation in tests/sim): a report counts only under the current fence and once per rank; job
states never go back; a job that was submitted ends or waits with a reason; the unfinished attempts of a node are ranks
of one generation of one job. A stop reaches every rank of its fence on its node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

from coordinator.control import events as e
from coordinator.control.group import (
    continue_recovery,
    forget_change,
    hand_over,
    lose_attempts,
    offers_again,
    take_report,
)
from coordinator.control.revision import revised, settled
from coordinator.control.schedule import schedule
from coordinator.control.state import JobView, NodeStatus, State, Timing
from coordinator.control.transitions import end, to
from protos.errors import Conflict, NotFound
from protos.ids import NodeId
from protos.states import (
    TERMINAL_ATTEMPT_STATES,
    Activity,
    AttemptState,
    Eligibility,
    JobState,
    NodeLink,
    Reason,
    StopMode,
)
from protos.work import HeldLease


@dataclass(frozen=True, slots=True)
class Decision:
    state: State
    effects: tuple[e.Effect, ...]
    reason: str


def step(state: State, event: e.Event, now_s: float, plan_for: e.PlanFor, timing: Timing) -> Decision:
    """Apply one event, then let time and freed nodes have their consequences. Raises Conflict or NotFound for a
    request that the state does not allow; nothing has changed then."""
    before, effects, reason = _apply(state, event, now_s, timing)
    if isinstance(event, e.NodeHeard) and event.activity is None:
        return Decision(before, tuple(effects), reason)
    after, more = _consequences(before, now_s, plan_for, timing, ticked=isinstance(event, e.Ticked))
    return Decision(after, (*effects, *more), reason)


def _apply(state: State, event: e.Event, now_s: float, timing: Timing) -> tuple[State, list[e.Effect], str]:
    match event:
        case e.Submitted():
            new = JobView(job_id=event.job_id, order=event.order)
            new = to(new, JobState.PLANNING)
            return state.with_job(_identifying(new, now_s, timing)), [e.Identify(event.job_id)], "submitted"
        case e.Identified():
            job = state.jobs.get(event.job_id)
            if job is None or job.ended:
                return state, [], "identified too late"
            if job.state is not JobState.PLANNING:
                return state.with_job(replace(job, identified=True)), [], "identified"
            job = replace(to(job, JobState.QUEUED), identified=True, not_before_s=now_s)
            return state.with_job(job), [], "identified"
        case e.Refused():
            job = state.jobs.get(event.job_id)
            if job is None or job.ended or job.identified:
                return state, [], "refused too late"
            ended = end(job, JobState.FAILED, event.reason, event.message, event.hint, event.blame)
            return state.with_job(ended), [e.Finish(job.job_id)], event.message
        case e.IdentificationDelayed():
            job = state.jobs.get(event.job_id)
            if job is None or job.state is not JobState.PLANNING:
                return state, [], "delayed too late"
            later_s = now_s + timing.backoff_s(0)
            job = replace(job, reason=Reason.WAITING_FOR_NODES, message=event.message, not_before_s=later_s)
            return state.with_job(job), [], event.message
        case e.NodeConnected():
            return _node_connected(state, event, now_s, timing)
        case e.NodeHeard():
            return _node_heard(state, event, now_s, timing)
        case e.NodeDisconnected():
            node = state.nodes.get(event.node_id)
            if node is None or node.link is not NodeLink.CONNECTED:
                return state, [], "already disconnected"
            return state.with_node(_cut_off(node, "connection lost", now_s)), [], "disconnected"
        case e.NodeLeft():
            return _node_left(state, event, now_s, timing)
        case e.NodeControlled():
            return _node_controlled(state, event, now_s, timing)
        case e.AttemptReported():
            return take_report(state, event, now_s, timing)
        case e.Progressed():
            return _progressed(state, event)
        case e.Revised():
            return revised(state, event, now_s, timing)
        case e.Settled():
            return settled(state, event)
        case e.UserAsked():
            return _user_asked(state, event, now_s, timing)
        case e.Ticked():
            return state, [], "tick"
        case _:
            assert_never(event)


def _identifying(job: JobView, now_s: float, timing: Timing) -> JobView:
    """Asked now, and again should the answer be lost on its way (`not_before_s`)."""
    again_s = now_s + timing.identify_s
    return replace(job, reason=Reason.IDENTIFYING, message="identifying the model", hint="", not_before_s=again_s)


def _node_connected(
    state: State, event: e.NodeConnected, now_s: float, timing: Timing
) -> tuple[State, list[e.Effect], str]:
    known = state.nodes.get(event.node_id)
    eligibility = known.eligibility if known else Eligibility.OK
    node = NodeStatus(
        event.node_id, event.name, NodeLink.CONNECTED, eligibility, event.activity, event.activity_reason, now_s
    )
    state = state.with_node(node)
    effects: list[e.Effect] = []
    presented = {(lease.job_id, lease.fence, lease.rank) for lease in event.leases}
    for lease in event.leases:
        job = state.jobs.get(lease.job_id)
        if job is not None and _works(job, lease, event.node_id):
            mode = job.wanted or (StopMode.HOLD if job.state is JobState.RECOVERING else None)
            if mode is not None:  # said while the node was away
                effects.append(e.Stop(event.node_id, job.job_id, job.fence, mode, job.message))
        elif lease.state not in TERMINAL_ATTEMPT_STATES:  # an ended one must not stop the other ranks of its fence
            effects.append(
                e.Stop(event.node_id, lease.job_id, lease.fence, StopMode.HOLD, "this lease belongs to an older group")
            )
    for job in state.jobs.values():
        gone = [
            attempt.rank
            for attempt in job.working
            if attempt.node_id == event.node_id and (job.job_id, job.fence, attempt.rank) not in presented
        ]
        forming = job.state is JobState.STARTING and job.wanted is None and eligibility is not Eligibility.DRAINING
        offered = [rank for rank in gone if forming and _attempt_state(job, rank) is AttemptState.OFFERED]
        effects += offers_again(job, offered)
        lost = [rank for rank in gone if rank not in offered]
        if lost:
            state, more = lose_attempts(
                state, job.job_id, lost, Reason.NODE_LOST, f"{event.name} restarted", now_s, timing
            )
            effects += more
    if eligibility is Eligibility.DRAINING:
        state, more = _hand_over(state, event.node_id, f"{event.name} is draining", now_s, timing)
        effects += more
    return state, effects, "connected"


def _cut_off(node: NodeStatus, reason: str, now_s: float) -> NodeStatus:
    return replace(node, link=NodeLink.DISCONNECTED, reason=reason, cut_off_s=now_s)


def _attempt_state(job: JobView, rank: int) -> AttemptState:
    return next(attempt.state for attempt in job.attempts if attempt.rank == rank)


def _node_heard(state: State, event: e.NodeHeard, now_s: float, timing: Timing) -> tuple[State, list[e.Effect], str]:
    node = state.nodes.get(event.node_id)
    if node is None:
        return state, [], "not a member"
    if node.link is NodeLink.LEFT:
        return state, [], "a member that left says nothing more on this stream"
    # Its stream is open, so a node that was given up for its silence (frozen, asleep) is here again.
    node = replace(node, last_seen_s=now_s, link=NodeLink.CONNECTED)
    stops = event.activity is Activity.PAUSED and node.activity is Activity.BUSY
    if event.activity is not None:
        node = replace(node, activity=event.activity, reason=event.activity_reason)
    state = state.with_node(node)
    effects: list[e.Effect] = []
    if stops:  # its owner's word: it stops what it works on by itself, the others of the group hear of it here
        state, effects = _hand_over(state, node.node_id, f"{node.name}: {node.reason}", now_s, timing)
    return state, effects, "heard"


def _node_left(state: State, event: e.NodeLeft, now_s: float, timing: Timing) -> tuple[State, list[e.Effect], str]:
    node = state.nodes.get(event.node_id)
    if node is None:
        return state, [], "not a member"
    state = state.with_node(replace(node, link=NodeLink.LEFT, reason=event.why))
    return _lose_node(state, event.node_id, Reason.NODE_LEFT, f"{node.name} left: {event.why}", now_s, timing)


def _node_controlled(
    state: State, event: e.NodeControlled, now_s: float, timing: Timing
) -> tuple[State, list[e.Effect], str]:
    node = state.nodes.get(event.node_id)
    if node is None:
        raise NotFound(f"no node {event.node_id}", "hive nodes lists them")
    match event.action:
        case "cordon":
            return state.with_node(replace(node, eligibility=Eligibility.CORDONED)), [], "cordoned: takes no new work"
        case "uncordon":
            return state.with_node(replace(node, eligibility=Eligibility.OK)), [], "takes work again"
        case "drain":
            state = state.with_node(replace(node, eligibility=Eligibility.DRAINING))
            if not node.reachable:
                return state, [], "draining once it is back"
            state, effects = _hand_over(state, event.node_id, f"{node.name} is draining", now_s, timing)
            return state, effects, "draining"
        case "remove":
            state, effects, reason = _lose_node(
                state, event.node_id, Reason.NODE_LEFT, f"{node.name} was removed", now_s, timing
            )
            return state.with_node(replace(node, link=NodeLink.LEFT, reason="removed")), effects, reason
        case other:
            raise Conflict(f"unknown action {other!r} for a node", "use cordon, uncordon, drain or remove")


def _hand_over(state: State, node_id: NodeId, why: str, now_s: float, timing: Timing) -> tuple[State, list[e.Effect]]:
    """Whatever a node works on now goes on elsewhere, from where it is."""
    effects: list[e.Effect] = []
    for job in list(state.jobs.values()):
        if not job.ended:
            job, stops = hand_over(job, node_id, why, now_s, timing)
            state, effects = state.with_job(job), [*effects, *stops]
    return state, effects


def _stop_on(state: State, node_id: NodeId, why: str) -> list[e.Effect]:
    """Hold whatever a node works on now."""
    return [
        e.Stop(node_id, job.job_id, job.fence, StopMode.HOLD, why)
        for job in state.jobs.values()
        for attempt in job.working
        if attempt.node_id == node_id
    ]


def _lose_node(
    state: State, node_id: NodeId, reason: Reason, message: str, now_s: float, timing: Timing
) -> tuple[State, list[e.Effect], str]:
    effects: list[e.Effect] = []
    for job in list(state.jobs.values()):
        ranks = [attempt.rank for attempt in job.working if attempt.node_id == node_id]
        if ranks:
            state, more = lose_attempts(state, job.job_id, ranks, reason, message, now_s, timing)
            effects += more
    return state, effects, message


def _progressed(state: State, event: e.Progressed) -> tuple[State, list[e.Effect], str]:
    job = state.jobs.get(event.job_id)
    if job is None or job.ended or job.fence != event.fence:
        return state, [], "progress of an older group"
    if event.step <= job.step:
        return state, [], "nothing new"
    retries = 0 if event.step > job.fence_step else job.retries
    return state.with_job(replace(job, step=event.step, samples=event.samples, retries=retries)), [], "progress"


def _user_asked(state: State, event: e.UserAsked, now_s: float, timing: Timing) -> tuple[State, list[e.Effect], str]:
    job = state.jobs.get(event.job_id)
    if job is None or job.ended:
        raise Conflict(f"{event.job_id} has already ended", "hive show tells how")
    match event.action:
        case "cancel":
            if job.wanted is StopMode.CANCEL:
                return state, [], "already being cancelled"
            if not job.working:
                ended = end(job, JobState.CANCELLED, Reason.CANCELLED_BY_USER, "cancelled before it ran", "", None)
                return state.with_job(ended), [e.Finish(job.job_id)], "cancelled"
            job = to(job, JobState.STOPPING, Reason.CANCELLED_BY_USER, "stopping on request")
            job = replace(job, wanted=StopMode.CANCEL, deadline_s=now_s + timing.stop_s)
            return state.with_job(job), _stop_all(job, StopMode.CANCEL, "cancelled by its user"), "stopping"
        case "pause":
            if job.state in (JobState.PAUSED, JobState.STOPPING) or job.wanted is StopMode.PAUSE:
                raise Conflict(f"{job.job_id} is already {job.state.value.lower()}", "hive resume lets it go on")
            if not job.working:
                job = to(job, JobState.PAUSED, Reason.PAUSED_BY_USER, "paused; hive resume lets it go on")
                job = forget_change(job)
                return state.with_job(job), [] if job.identified else [e.StopIdentifying(job.job_id)], "paused"
            job = replace(job, wanted=StopMode.PAUSE, deadline_s=now_s + timing.hand_over_s)
            job = replace(job, reason=Reason.PAUSED_BY_USER, message="pausing on request")
            return state.with_job(job), _stop_all(job, StopMode.PAUSE, "paused by its user"), "pausing"
        case "resume":
            if job.wanted is StopMode.PAUSE or job.state is not JobState.PAUSED:
                raise Conflict(f"{job.job_id} is not paused", "hive show tells its state")
            if not job.identified:
                job = _identifying(to(job, JobState.PLANNING), now_s, timing)
                return state.with_job(job), [e.Identify(job.job_id)], "resumed"
            job = replace(to(job, JobState.QUEUED, Reason.NONE, "resumed"), not_before_s=now_s, retries=0)
            return state.with_job(job), [], "resumed"
        case other:
            raise Conflict(f"unknown action {other!r} for a job", "use cancel, pause or resume")


def _stop_all(job: JobView, mode: StopMode, reason: str) -> list[e.Effect]:
    return [e.Stop(attempt.node_id, job.job_id, job.fence, mode, reason) for attempt in job.working]


def _consequences(
    state: State, now_s: float, plan_for: e.PlanFor, timing: Timing, *, ticked: bool
) -> tuple[State, list[e.Effect]]:
    effects: list[e.Effect] = []
    if ticked:
        state, more = _expire(state, now_s, timing)
        effects += more
    for job_id in list(state.jobs):
        state, more = continue_recovery(state, job_id, now_s, timing)
        effects += more
        job = state.jobs[job_id]
        if job.state is JobState.PLANNING and now_s >= job.not_before_s and state.willing():
            state = state.with_job(_identifying(job, now_s, timing))
            effects.append(e.Identify(job_id))
    state, more = schedule(state, now_s, plan_for, timing)
    return state, [*effects, *more]


def _expire(state: State, now_s: float, timing: Timing) -> tuple[State, list[e.Effect]]:
    """Silence and missed deadlines. A connected node that says nothing for the lease's life is as lost as a cut one."""
    effects: list[e.Effect] = []
    state = _spare_silent_groups(state, now_s, timing)
    for node in list(state.nodes.values()):
        silent_s = now_s - node.last_seen_s
        if node.link is NodeLink.CONNECTED and silent_s > timing.lease_ttl_s:
            state = state.with_node(_cut_off(node, f"silent for {silent_s:.0f} s", now_s))
        elif node.link is NodeLink.DISCONNECTED and _is_lost(node, now_s, timing):
            why = f"{node.name} was not heard for {silent_s:.0f} s"
            effects += _stop_on(state, node.node_id, why)  # a frozen node reads it when it goes on
            state = state.with_node(replace(node, link=NodeLink.LOST, reason=f"not heard for {silent_s:.0f} s"))
            state, more, _ = _lose_node(state, node.node_id, Reason.NODE_LOST, why, now_s, timing)
            effects += more
    for job in list(state.jobs.values()):
        late = [attempt for attempt in job.working if attempt.rank in _late(state, job, now_s, timing)]
        if late:
            names = ", ".join(state.nodes[a.node_id].name if a.node_id in state.nodes else a.node_id for a in late)
            why = f"no answer in time from {names}"
            effects += [e.Stop(a.node_id, job.job_id, job.fence, StopMode.CANCEL, why) for a in late]
            ranks = [attempt.rank for attempt in late]
            state, more = lose_attempts(state, job.job_id, ranks, Reason.NODE_LOST, why, now_s, timing)
            effects += more
    return state, effects


def _spare_silent_groups(state: State, now_s: float, timing: Timing) -> State:
    """When the whole group of a running job falls silent at once, the one that is cut off is this coordinator. The
    group needs it for nothing until it is done, and gets time to come back: all of it, one after the other."""
    for job in state.jobs.values():
        group = [state.nodes[node_id] for node_id in {a.node_id for a in job.working} if node_id in state.nodes]
        if job.state is not JobState.RUNNING or len(group) < 2:
            continue
        if now_s - max(node.last_seen_s for node in group) > timing.lease_ttl_s / 2:
            for node in group:
                state = state.with_node(replace(node, spared_until_s=now_s + timing.lease_ttl_s))
    return state


def _is_lost(node: NodeStatus, now_s: float, timing: Timing) -> bool:
    """After its lease's life; a spared one later, but no spared one is waited for longer than the grace."""
    silent_s = now_s - node.last_seen_s
    return silent_s > timing.reconnect_grace_s or (silent_s > timing.lease_ttl_s and now_s > node.spared_until_s)


def _late(state: State, job: JobView, now_s: float, timing: Timing) -> list[int]:
    """Ranks that this job waits for no longer: over the deadline of the phase, or cut off while the rest re-forms."""
    if job.deadline_s is not None and now_s > job.deadline_s:
        if job.state is JobState.STARTING and job.wanted is None:
            return [a.rank for a in job.working if a.state in (AttemptState.OFFERED, AttemptState.ACCEPTED)]
        return [a.rank for a in job.working]
    if job.state is not JobState.RECOVERING:
        return []
    cut_off = {n.node_id: n.cut_off_s for n in state.nodes.values() if n.link is NodeLink.DISCONNECTED}
    return [a.rank for a in job.working if a.node_id in cut_off and now_s > cut_off[a.node_id] + timing.cut_off_grace_s]


def _works(job: JobView, lease: HeldLease, node_id: NodeId) -> bool:
    return (
        not job.ended
        and job.fence == lease.fence
        and any(a.rank == lease.rank and a.node_id == node_id for a in job.working)
    )


__all__ = ["Decision", "step"]
