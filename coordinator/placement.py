"""Between the control loop's question "where can this job run now" and the planner's answer.

Owns what is waiting and what is refusal: a job waits for nodes that are busy, too few, or away (just after a restart of
the coordinator all are), and is refused when none of them would help. A question that was just answered with no is not
asked again until something changed.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from coordinator import planner, spares
from coordinator.cluster import JOIN_HINT, WAIT_HINT, Away, cluster_view, once_back, said_of
from coordinator.control.events import Unplaced
from coordinator.learning import Learner
from coordinator.left_groups import LeftGroups
from coordinator.sessions import Sessions
from coordinator.submission import Submission
from coordinator.unplaced import considered
from protos.errors import NoPlacement
from protos.ids import JobId, NodeId, PlanId
from protos.jobspec import JobSpec, StrategyName
from protos.log import Log
from protos.plan import Candidate, ClusterView, Identification, Plan, SparePlan
from protos.states import Reason

log = Log("hive.coordinator.placement")


@dataclass(frozen=True, slots=True)
class Known:
    """What the planner needs of a job, decoded once."""

    submission: Submission
    found: Identification


class Placement:
    def __init__(
        self,
        sessions: Sessions,
        learner: Learner,
        rng: random.Random,
        nobody: Callable[[], tuple[str, str]],
        away: Callable[[], tuple[Away, ...]],
        mtbf_s: Callable[[NodeId], float | None] = lambda node_id: None,
    ) -> None:
        self._sessions = sessions
        self._learner = learner
        self._rng = rng
        self._nobody = nobody  # why no node takes work, and a hint
        self._away = away  # members that take no work now
        self._mtbf_s = mtbf_s
        self._jobs: dict[JobId, Known] = {}
        self._refused: dict[JobId, tuple[object, Unplaced]] = {}
        self._prepared: dict[JobId, tuple[float, spares.Prepared]] = {}  # when, and for which losses
        self._left = LeftGroups()

    def know(self, job_id: JobId, submission: Submission, found: Identification) -> None:
        self._jobs[job_id] = Known(submission, found)

    def known(self, job_id: JobId) -> Known | None:
        return self._jobs.get(job_id)

    def view(self, nodes: Collection[NodeId]) -> ClusterView:
        """Those of them that are connected, with all that is known of them."""
        return cluster_view(self._sessions, nodes, self._learner.speeds.learned(), self._mtbf_s)

    def view_for(self, job_id: JobId, nodes: Collection[NodeId]) -> ClusterView:
        """The same as this running job sees it, which may have left a group that had become slow."""
        view = self.view(nodes)
        return replace(view, learned=self._left.over(view.learned, job_id))

    def left(self, job_id: JobId, plan: Plan, step_s: float) -> None:
        """The job gives up the group of this plan, whose steps took so long lately."""
        if job_id in self._jobs:  # it may have ended while this was decided
            self._left.note(job_id, plan, step_s)

    def earlier(self, job_id: JobId) -> tuple[Plan, ...]:
        """Of the groups that this job gave up."""
        return self._left.plans(job_id)

    def learned_of(self, node_id: NodeId) -> dict[str, object]:
        """What finished jobs have taught about a node, for people."""
        return self._learner.speeds.of_node(node_id)

    def forget(self, job_id: JobId) -> None:
        self._jobs.pop(job_id, None)
        self._refused.pop(job_id, None)
        self._prepared.pop(job_id, None)
        self._left.forget(job_id)

    def refused(self, job_id: JobId) -> tuple[Candidate, ...]:
        """What was considered when a job that waits was last refused."""
        refused = self._refused.get(job_id)
        return refused[1].candidates if refused is not None else ()

    async def plan_now(self, submission: Submission, found: Identification, nodes: tuple[NodeId, ...]) -> Plan:
        """A dry run over all nodes that would take work, with how it would go on without some. Raises NoPlacement.

        In a thread, on copies: with many nodes it takes seconds, and the control loop must not wait for a question."""
        if not nodes:
            raise NoPlacement(*self._nobody())
        view = self.view(nodes)
        spec, table, ledger = submission.spec, copy.deepcopy(self._learner.table), self._learner.ledger
        rng = random.Random(self._rng.getrandbits(64))

        def planned() -> Plan:
            made = planner.plan(spec, found.profile, found.data, view, table, rng, ledger)
            return replace(made, spares=planner.spare_plans(made, spec, found.profile, found.data, view))

        return await asyncio.to_thread(planned)

    async def prepare(self, job_id: JobId, plan: Plan, nodes: tuple[NodeId, ...], now_s: float) -> None:
        """Plan for the losses of a running job, in a thread; nothing when that is done and nothing has changed since,
        or changed just now. `nodes`: its own and those it could have beside them."""
        known, view = self._jobs.get(job_id), self.view_for(job_id, nodes)
        if known is None or len(view.nodes) < len(nodes):
            return
        last = self._prepared.get(job_id)
        if last is not None and last[1].plan_id == plan.id:
            made_s, before = last
            if now_s - made_s < spares.AGAIN_S or spares.same_for_planning(before.view, view):
                return
        spec, found, table = known.submission.spec, known.found, copy.deepcopy(self._learner.table)
        made = await asyncio.to_thread(spares.prepare, plan, spec, found.profile, found.data, view, table)
        if job_id in self._jobs:
            self._prepared[job_id] = (now_s, made)

    def spares_of(self, job_id: JobId, plan_id: PlanId) -> tuple[SparePlan, ...]:
        """What is planned beforehand for the losses of a running job's plan, for people."""
        last = self._prepared.get(job_id)
        return last[1].spares if last is not None and last[1].plan_id == plan_id else ()

    def plan_for(
        self,
        job_id: JobId,
        idle: tuple[NodeId, ...],
        willing: tuple[NodeId, ...],
        holders: tuple[NodeId, ...],
        previous: str | None,
    ) -> Plan | Unplaced:
        """coordinator.control.events.PlanFor."""
        if not willing:
            self._refused.pop(job_id, None)
            return Unplaced(*self._nobody(), permanent=False, reason=Reason.WAITING_FOR_NODES)
        known = self._jobs.get(job_id)
        if known is None:
            return _broken("what was found out about its model cannot be read by this version", "submit it again")
        capacities = tuple(self._sessions[n].capacity for n in idle if n in self._sessions)
        away = tuple((each.node_id, each.doing) for each in self._away())
        unanswered, memory = dict(self._sessions.unanswered), self._learner.speeds.learned().memory
        situation = (idle, willing, holders, capacities, away, unanswered, memory)
        refused = self._refused.get(job_id)
        if refused is not None and refused[0] == situation:
            return refused[1]
        try:
            beforehand = self._planned_beforehand(job_id, idle, holders, previous)
            placed = beforehand or self._place(job_id, known, idle, willing, holders, previous)
        except Exception as error:  # one job that the planner cannot take must not hold up all others
            log.exception("the planner failed", job=job_id)
            self._refused.pop(job_id, None)
            return _broken(f"the planner failed: {type(error).__name__}: {error}", "see the coordinator's log")
        if isinstance(placed, Unplaced):
            self._refused[job_id] = (situation, placed)
        else:
            self._refused.pop(job_id, None)
        return placed

    def _planned_beforehand(
        self, job_id: JobId, idle: tuple[NodeId, ...], holders: tuple[NodeId, ...], previous: str | None
    ) -> Plan | None:
        last = self._prepared.get(job_id)
        if last is None or previous is None:
            return None
        return last[1].plan_for(previous, self.view_for(job_id, idle), holders)

    def _place(
        self,
        job_id: JobId,
        known: Known,
        idle: tuple[NodeId, ...],
        willing: tuple[NodeId, ...],
        holders: tuple[NodeId, ...],
        previous: str | None,
    ) -> Plan | Unplaced:
        spec, found, learner = known.submission.spec, known.found, self._learner
        view = self.view_for(job_id, idle)
        try:
            if previous is not None:
                return planner.replan(previous, spec, found.profile, found.data, view, learner.table, holders=holders)
            return planner.plan(spec, found.profile, found.data, view, learner.table, self._rng, learner.ledger)
        except NoPlacement as error:
            everyone, weighed = self.view(willing), considered(error)
            if len(idle) < len(willing) and planner.placeable_when_idle(spec, found.profile, found.data, everyone):
                message = "waits for nodes that are busy with earlier jobs"
                return Unplaced(message, "", False, Reason.WAITING_FOR_BUSY_NODES, weighed)
            too_few = len(willing) < _needed(spec)
            if too_few or previous is not None:
                message = f"needs {_needed(spec)} nodes, {len(willing)} take work" if too_few else error.message
                hint = JOIN_HINT if too_few else error.hint
                return Unplaced(message, hint, False, Reason.WAITING_FOR_NODES, weighed)
            missing = self._away()
            if any(each.capacity is None for each in missing) or planner.placeable_when_idle(
                spec, found.profile, found.data, once_back(everyone, missing)
            ):
                message = f"fits none of the nodes that take work now, and waits: {said_of(missing)}"
                return Unplaced(message, WAIT_HINT, False, Reason.WAITING_FOR_NODES, weighed)
            return Unplaced(error.message, error.hint, True, Reason.NO_PLACEMENT, weighed)


def _broken(message: str, hint: str) -> Unplaced:
    return Unplaced(message, hint, True, Reason.INTERNAL)


def _needed(spec: JobSpec) -> int:
    options = spec.strategy_options
    asked = (options.stages or 2) * (options.replicas or 1) if options else 2
    return max(spec.nodes.min, 1 if spec.strategy in ("auto", StrategyName.SINGLE_NODE) else asked)
