"""What a coordinator that starts again takes up from its store: unfinished jobs, their groups, the members.

A restart is a non-event: nodes are assumed to be there still and get `reconnect_grace_s` to say so. What differs from
the records (a group that was forming is lost, nodes are not connected) is written down before anything else happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from coordinator.control.state import AttemptView, Held, JobView, NodeStatus, State, Timing, Transition
from coordinator.records import Attempt, Job, Member
from coordinator.store.protocol import Store
from protos import documents
from protos.ids import Fence, JobId, NodeId
from protos.plan import Plan
from protos.states import (
    TERMINAL_JOB_STATES,
    JobState,
    NodeLink,
    Reason,
    StopMode,
)
from protos.work import Outcome

RESTARTED = "the coordinator restarted"


@dataclass(frozen=True, slots=True)
class Found:
    state: State
    records: dict[JobId, Job]
    attempts: dict[tuple[JobId, Fence, int], Attempt]
    members: dict[NodeId, Member]
    orders: int


async def load(store: Store, now_s: float, timing: Timing) -> Found:
    """Everything unfinished, as the control loop holds it."""
    unfinished = [state for state in JobState if state not in TERMINAL_JOB_STATES]
    records = {job.job_id: job for job in await store.jobs(unfinished, limit=1_000_000)}
    attempts: dict[tuple[JobId, Fence, int], Attempt] = {}
    views: dict[JobId, JobView] = {}
    for order, record in enumerate(sorted(records.values(), key=lambda job: job.created_s), start=1):
        rows = await store.attempts(record.job_id)
        attempts |= {(row.job_id, row.fence, row.rank): row for row in rows}
        views[record.job_id] = _view(record, rows, order, now_s, timing)
    members = {member.node_id: member for member in await store.members()}
    nodes = {
        member.node_id: _status(member, now_s, timing)
        for member in members.values()
        if member.role == "node" and not member.left
    }
    return Found(State(MappingProxyType(nodes), MappingProxyType(views)), records, attempts, members, len(records))


def _status(member: Member, now_s: float, timing: Timing) -> NodeStatus:
    waits = member.link in (NodeLink.CONNECTED, NodeLink.DISCONNECTED)
    heard_s = now_s + timing.reconnect_grace_s - timing.lease_ttl_s if waits else member.last_seen_s
    link = NodeLink.DISCONNECTED if waits else member.link
    return NodeStatus(
        member.node_id,
        member.name,
        link,
        member.eligibility,
        reason=RESTARTED if waits else member.reason,
        last_seen_s=heard_s,
        cut_off_s=heard_s,
    )


def _view(record: Job, rows: tuple[Attempt, ...], order: int, now_s: float, timing: Timing) -> JobView:
    outcomes = {row: documents.decode(Outcome, row.outcome_json) for row in rows if row.outcome_json}
    held: dict[NodeId, int] = {}
    for row, outcome in outcomes.items():
        if outcome.held_step is not None:
            held[row.node_id] = max(outcome.held_step, held.get(row.node_id, 0))
    forming = record.state in (JobState.STARTING, JobState.RUNNING, JobState.RECOVERING, JobState.STOPPING)
    current = tuple(
        AttemptView(row.rank, row.node_id, row.state, outcomes.get(row))
        for row in rows
        if forming and row.fence == record.fence
    )
    wanted = None
    if record.state is JobState.STOPPING:
        wanted = StopMode.CANCEL
    elif forming and record.reason is Reason.PAUSED_BY_USER:
        wanted = StopMode.PAUSE
    state, reason, message = record.state, record.reason, record.message
    if state is JobState.STARTING and wanted is None:
        state, reason = JobState.RECOVERING, Reason.COORDINATOR_RESTARTED
        message = "the coordinator restarted while the group was forming"
    trail = () if state is record.state else (Transition(state, reason, message, record.hint),)
    bounded = state is JobState.RECOVERING or wanted is not None
    return JobView(
        job_id=record.job_id,
        order=order,
        state=state,
        reason=reason,
        message=message,
        hint=record.hint,
        blame=record.blame,
        fence=record.fence,
        retries=record.retries,
        fence_step=record.step,
        step=record.step,
        samples=record.samples,
        wanted=wanted,
        not_before_s=now_s + (timing.identify_s if record.state is JobState.PLANNING else 0.0),
        deadline_s=now_s + timing.reconnect_grace_s + timing.hold_s if bounded else None,
        identified=record.profile_json is not None,
        plan=documents.decode(Plan, record.plan_json) if record.plan_json else None,
        attempts=current,
        held=tuple(Held(node_id, step) for node_id, step in held.items()),
        trail=trail,
    )
