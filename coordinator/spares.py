"""Plans made beforehand for a job whose model is cut: how it goes on without one of its nodes, or any two of a few.

Owns which running jobs need them, and when one still holds: exactly those nodes are left, with the same grants, speeds,
links and learned knowledge as when it was made. Then it is what a re-plan would give; otherwise the re-plan stands.
Invariant: they are worked out in a thread, so the control loop never waits for them. They are not durable: after a
restart of the coordinator they are made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from coordinator import planner
from coordinator.control.state import JobView, State
from protos.errors import NoPlacement
from protos.ids import JobId, NodeId, PlanId, new_plan_id
from protos.jobspec import JobSpec
from protos.log import Log
from protos.model import ModelProfile
from protos.plan import ClusterView, DataProfile, NodeView, Plan, SparePlan
from protos.states import JobState
from qtable.table import QTable

log = Log("hive.coordinator.spares")

SAID = "as planned beforehand"
AGAIN_S = 60.0  # at the soonest, when the nodes or what is known of them have changed
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """Of one plan: what was looked at, the plan for every loss that can be survived, and all of them for people."""

    plan_id: PlanId
    strategy: str
    view: ClusterView
    plans: Mapping[frozenset[NodeId], Plan]  # by the nodes that are left
    spares: tuple[SparePlan, ...]

    def plan_for(self, previous: str, view: ClusterView, holders: Collection[NodeId]) -> Plan | None:
        """For those nodes exactly as they are; None when something that matters is different."""
        left = frozenset(node.node_id for node in view.nodes)
        made = self.plans.get(left)
        if made is None or previous != self.strategy:
            return None
        lost = {node.node_id for node in self.view.nodes} - left
        used = {subtask.node_id for subtask in made.subtasks}
        held = not holders or not used.isdisjoint(holders)
        if not held or not same_for_planning(planner.without(self.view, tuple(lost)), view):
            return None
        return replace(made, id=new_plan_id())


def prepare(
    made: Plan, spec: JobSpec, profile: ModelProfile, data: DataProfile, view: ClusterView, table: QTable
) -> Prepared:
    """Takes as long as so many plans: for a thread. `view`: the nodes of the plan and those that are idle beside it."""
    used = {subtask.node_id for subtask in made.subtasks}
    plans: dict[frozenset[NodeId], Plan] = {}
    spares = []
    for lost in planner.losses(made):
        rest = planner.without(view, lost)
        try:
            spare = planner.replan(made.strategy, spec, profile, data, rest, table, holders=used - set(lost))
        except NoPlacement as error:
            spares.append(SparePlan(lost, "", (), reason=error.message))
            continue
        plans[frozenset(node.node_id for node in rest.nodes)] = replace(spare, reason=f"{spare.reason}, {SAID}")
        spares.append(_shown(made, lost, spare))
    return Prepared(made.id, made.strategy, view, plans, tuple(spares))


def _shown(made: Plan, lost: tuple[NodeId, ...], spare: Plan) -> SparePlan:
    before = next((each for each in spare.candidates if each.strategy == made.strategy), None)
    why = "; ".join(before.reasons) if before is not None and spare.strategy != made.strategy else ""
    nodes = tuple(dict.fromkeys(subtask.node_id for subtask in spare.subtasks))
    return SparePlan(lost, spare.strategy, nodes, spare.estimate.seconds, why)


def same_for_planning(a: ClusterView, b: ClusterView) -> bool:
    """Whether the same plan would come of both: free disk, load and battery are of no account."""
    return (
        [_lasting(node) for node in a.nodes] == [_lasting(node) for node in b.nodes]
        and a.links == b.links
        and a.apart == b.apart
        and (a.learned is b.learned or a.learned == b.learned)
    )


def _lasting(node: NodeView) -> NodeView:
    gpus = tuple(replace(gpu, memory_free_bytes=0, utilisation=0.0) for gpu in node.capacity.gpus)
    capacity = replace(
        node.capacity, disk_free_bytes=0, load=None, battery=None, on_mains=None, user_idle_s=None, gpus=gpus
    )
    return replace(node, capacity=capacity)


def needs_spares(job: JobView) -> bool:
    """A running job of several nodes none of which has the whole model."""
    plan = job.plan
    if job.state is not JobState.RUNNING or job.wanted is not None or plan is None or plan.layout is None:
        return False
    cut = len(plan.layout.stages) > 1 or plan.layout.sharded or plan.layout.tensor > 1
    return cut and len({attempt.node_id for attempt in job.attempts}) > 1


def among(state: State, job: JobView) -> tuple[NodeId, ...]:
    """The nodes of a job and those that it could have beside them; nothing when one of its own is not there."""
    own = {attempt.node_id for attempt in job.attempts}
    if not own <= set(state.willing()):
        return ()
    return tuple(sorted(own | {node_id for node_id in state.idle() if node_id not in job.avoid}))


class Preparing(Protocol):
    """coordinator.placement.Placement."""

    async def prepare(self, job_id: JobId, plan: Plan, nodes: tuple[NodeId, ...], now_s: float) -> None: ...


async def keep_prepared(state: Callable[[], State], placement: Preparing, clock: Callable[[], float]) -> None:
    """Until cancelled: one job after the other, so that at most one thread plans beforehand."""
    while True:
        await asyncio.sleep(_LOOK_S)
        for job in list(state().jobs.values()):
            nodes = among(state(), job) if needs_spares(job) else ()
            if nodes and job.plan is not None:
                try:
                    await placement.prepare(job.job_id, job.plan, nodes, clock())
                except Exception:  # without one it is planned when it is needed
                    log.exception("nothing planned beforehand", job=job.job_id)
