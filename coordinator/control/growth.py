"""A node that comes while a data-parallel job runs may join its group, when what it saves is worth the interruption.

Every rank holds the whole state, so a larger group goes on from the last committed step: the ranks hold, the group
forms again with the newcomer, which receives the state from a peer. Jobs that wait for a node come first.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.control import events as e
from coordinator.control.group import regroup
from coordinator.control.state import JobView, State, Timing
from protos.ids import NodeId
from protos.plan import Plan
from protos.states import JobState, Reason

GROWS = frozenset({"data_parallel"})


def grow(state: State, now_s: float, plan_for: e.PlanFor, timing: Timing) -> tuple[State, list[e.Effect]]:
    """Asks for each running job when a node has become idle that it was not asked about, and then now and again."""
    effects: list[e.Effect] = []
    if any(job.state is JobState.QUEUED for job in state.jobs.values()):
        return state, effects
    for job in sorted(state.jobs.values(), key=lambda job: job.order):
        idle = tuple(node_id for node_id in state.idle() if node_id not in job.avoid)
        if not idle or not _may_grow(job, idle, now_s):
            continue
        own = tuple(sorted({attempt.node_id for attempt in job.attempts}))
        if not set(own) <= set(state.willing()):  # one is about to leave: the group forms again anyway
            continue
        previous = job.plan.strategy if job.plan else None
        found = plan_for(job.job_id, tuple(sorted((*own, *idle))), state.willing(), own, previous)
        job = replace(job, grow_at_s=now_s + timing.grow_every_s, passed_over=frozenset(idle))
        if isinstance(found, Plan) and job.plan is not None and _worth_it(job, job.plan, found, timing):
            joining = sorted({subtask.node_id for subtask in found.subtasks} - set(own))
            names = ", ".join(state.nodes[node_id].name for node_id in joining)
            job, more = regroup(job, Reason.GROUP_GROWS, f"{names} joins the group", now_s, timing)
            effects += more
        state = state.with_job(job)
    return state, effects


def _may_grow(job: JobView, idle: tuple[NodeId, ...], now_s: float) -> bool:
    if job.plan is None or job.plan.strategy not in GROWS or job.wanted is not None:
        return False
    due = now_s >= job.grow_at_s or (bool(job.passed_over) and not set(idle) <= job.passed_over)
    return due and job.state is JobState.RUNNING and job.step > job.fence_step


def _worth_it(job: JobView, now: Plan, then: Plan, timing: Timing) -> bool:
    """Gain over the steps that are left > 2 x what the interruption costs, and nobody of the group is left out."""
    own = {attempt.node_id for attempt in job.attempts}
    if then.strategy != now.strategy or not own < {subtask.node_id for subtask in then.subtasks}:
        return False
    steps = now.steps or then.steps
    if steps is None:
        return False
    gain_s = (steps - job.step) * (now.estimate.step_s - then.estimate.step_s)
    return gain_s > 2 * timing.regroup_cost_s
