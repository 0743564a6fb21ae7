"""A node that comes while a job runs on whole models may join it, when what it saves is worth the interruption.

Every rank holds the whole state, so a larger group goes on from the last committed step: the ranks hold, the group
forms again with the newcomer, which receives the state from a peer. A job on one node is a group of one: whether its
job file lets it become data-parallel is the planner's to say. Jobs that wait for a node come first.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.control import events as e
from coordinator.control.group import regroup
from coordinator.control.state import JobView, State, Timing
from protos.ids import NodeId
from protos.plan import Plan
from protos.states import JobState, Reason

INTO = "data_parallel"
GROWS = frozenset({"single_node", INTO})


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
        now, then = (  # both with what is known of the nodes today: the plan that runs may be older
            plan_for(job.job_id, nodes, state.willing(), own, previous) for nodes in (own, tuple(sorted((*own, *idle))))
        )
        job = replace(job, grow_at_s=now_s + timing.grow_every_s, passed_over=frozenset(idle))
        if isinstance(now, Plan) and isinstance(then, Plan) and _worth_it(job, now, then, timing):
            message = _said(state, set(own), {subtask.node_id for subtask in then.subtasks})
            job, more = regroup(job, Reason.GROUP_GROWS, message, now_s, timing)
            effects += more
        state = state.with_job(job)
    return state, effects


def _may_grow(job: JobView, idle: tuple[NodeId, ...], now_s: float) -> bool:
    if job.plan is None or job.plan.strategy not in GROWS or job.wanted is not None:
        return False
    due = now_s >= job.grow_at_s or (bool(job.passed_over) and not set(idle) <= job.passed_over)
    return due and job.state is JobState.RUNNING and job.step > job.fence_step


def _worth_it(job: JobView, now: Plan, then: Plan, timing: Timing) -> bool:
    """Somebody joins, and the gain over the steps that are left > 2 x what the interruption costs."""
    own = {attempt.node_id for attempt in job.attempts}
    if then.strategy != INTO or not {subtask.node_id for subtask in then.subtasks} - own:
        return False
    steps = now.steps or then.steps
    if steps is None:
        return False
    gain_s = (steps - job.step) * (now.estimate.step_s - then.estimate.step_s)
    return gain_s > 2 * timing.regroup_cost_s


def _said(state: State, own: set[NodeId], planned: set[NodeId]) -> str:
    """late joins the group, slow is left out of it"""
    joining, leaving = (
        ", ".join(state.nodes[node_id].name for node_id in sorted(nodes)) for nodes in (planned - own, own - planned)
    )
    return f"{joining} joins the group" + (f", {leaving} is left out of it" if leaving else "")
