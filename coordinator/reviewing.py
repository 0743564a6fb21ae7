"""When running jobs are looked at again, and what follows: the shell around the pure `review`.

A job is looked at once its group has made enough steps to judge, then once all ranks have said what theirs take, and
whenever its nodes, the idle ones, a link or what is known of them is different, or its own steps have become longer or
shorter by 1.3 times. Its steps are those of the last half minute: links of busy nodes are not probed, so they are all
that tells of a link that has become slow. Planning runs in a thread. What was decided is posted to the control loop,
which takes it only if it still holds there.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from coordinator.control import events as e
from coordinator.control.state import JobView
from coordinator.controller import Controller
from coordinator.job_folder import JobFolders
from coordinator.learning import Learner, usual_step_s
from coordinator.placement import Placement
from coordinator.planner import REGROUP_S
from coordinator.reliability import Reliability
from coordinator.review import Standing, Verdict, review
from coordinator.spares import among, same_for_planning
from coordinator.store.protocol import Store
from protos.capacity import LinkEstimate
from protos.errors import HiveError
from protos.ids import Fence, JobId
from protos.log import Log
from protos.plan import ClusterView
from protos.states import JobState
from protos.work import Metrics
from qtable.probing import ABORT_STEPS
from strategies.usual_step import LATELY_S, RUN_S

log = Log("hive.coordinator.reviewing")

LOOK_S = 0.5
LEAST_RUN_S = 1.0  # of a group: below it a CPU quota is not seen, nor what a step usually takes
WARM_STEPS = 3  # the first ones of a group load code and allocate
LATELY_RUNS = 5  # at least, of one step or a second: one or two of them may be slow without a change
AGAIN_S = 10.0  # at the soonest, and twice as long with every group after the first few
FREE_CHANGES = 4
LONGEST_S = 600.0
CHANGED = 1.3  # of a step or a link's bandwidth, up or down: another one than before
LONGER = 2.0  # the same of a round trip, which a busy machine changes by more
EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True)
class Look:
    """What was true when a job was last looked at. `refused`: what was decided did not hold any more."""

    when_s: float
    standing: Standing
    view: ClusterView
    refused: bool = False


class Reviewer:
    def __init__(
        self,
        controller: Controller,
        placement: Placement,
        learner: Learner,
        reliability: Reliability,
        folders: JobFolders,
        store: Store,
        clock: Callable[[], float],
    ) -> None:
        self._controller = controller
        self._placement = placement
        self._learner = learner
        self._reliability = reliability
        self._folders = folders
        self._store = store
        self._clock = clock
        self._since: dict[JobId, tuple[Fence, float]] = {}  # when a group was first seen running
        self._looks: dict[JobId, Look] = {}

    async def run(self) -> None:
        """Until cancelled: one job after the other, so that at most one thread reviews."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._reliability.catch_up(self._store)
                await self.once()
            except Exception:  # a job goes on without a review
                log.exception("no review")

    async def once(self) -> None:
        jobs = self._controller.state.jobs
        for known in (self._since, self._looks):
            for job_id in known.keys() - jobs.keys():
                del known[job_id]
        for job in list(jobs.values()):
            try:
                standing = await self._standing(job)
                if standing is not None:
                    await self._review(job.job_id, standing)
            except Exception:  # it goes on without a review, and so do the others with theirs
                log.exception("no review", job=job.job_id)

    async def _standing(self, job: JobView) -> Standing | None:
        """None while there is nothing to judge."""
        if job.state is not JobState.RUNNING or job.wanted is not None or job.plan is None:
            return None
        now_s = self._clock()
        fence, since_s = self._since.get(job.job_id, (job.fence, now_s))
        if fence != job.fence:
            since_s = now_s
        self._since[job.job_id] = job.fence, since_s
        steps_here = job.step - job.fence_step
        progress = self._controller.progress(job.job_id) or {}
        if steps_here < ABORT_STEPS + WARM_STEPS or now_s - since_s < LEAST_RUN_S or progress.get("stage") == EVALUATE:
            return None
        records = await asyncio.to_thread(self._folders.recent_metrics, job.job_id, job.fence_step + WARM_STEPS)
        step_s = usual_step_s(lately(records))
        if step_s is None:
            return None
        made = steps_here - WARM_STEPS
        times, earlier = self._controller.step_times(job.job_id, job.fence), self._placement.earlier(job.job_id)
        return Standing(job.plan, job.fence, job.step, made, step_s, job.revisions, job.unfit, times, earlier)

    async def _review(self, job_id: JobId, standing: Standing) -> None:
        known = self._placement.known(job_id)
        left = None if standing.plan.steps is None else standing.plan.steps - standing.step
        if known is None or (left is not None and left * standing.step_s < REGROUP_S and not standing.trying):
            return  # nothing that could be saved would be worth a change
        nodes = among(self._controller.state, self._controller.state.jobs[job_id])
        view = self._placement.view_for(job_id, nodes)
        if not nodes or len(view.nodes) < len(nodes):
            return
        if not due(self._looks.get(job_id), standing, view, self._clock()):
            return
        await self._learner.catch_up(self._store)  # of trials before this one
        view = self._placement.view_for(job_id, nodes)
        self._looks[job_id] = Look(self._clock(), standing, view)
        spec, found, table = known.submission.spec, known.found, copy.deepcopy(self._learner.table)
        verdict = await asyncio.to_thread(review, standing, spec, found.profile, found.data, view, table)
        await self._perform(job_id, standing, verdict)

    async def _perform(self, job_id: JobId, standing: Standing, verdict: Verdict) -> None:
        try:
            if verdict.plan is not None:
                said = await self._controller.post(e.Revised(job_id, standing.fence, verdict.plan, verdict.message))
                log.info("job revised", job=job_id, said=said)
                if said != verdict.message:  # asked again soon
                    self._looks[job_id] = replace(self._looks[job_id], refused=True)
                else:
                    self._placement.left(job_id, standing.plan, standing.step_s)
            elif verdict.over:
                await self._controller.post(e.Settled(job_id, standing.fence))
        except HiveError as error:
            log.warning("job not revised", job=job_id, reason=error.message)


def due(last: Look | None, standing: Standing, view: ClusterView, now_s: float) -> bool:
    """Whether there is something to decide that was not there when the job was last looked at."""
    if last is None:
        return True
    new_group = last.standing.fence != standing.fence
    if standing.trying and (new_group or (standing.tried and not last.standing.tried)):
        return True
    changes = min(10, max(0, standing.changes - FREE_CHANGES))
    if new_group and not changes:
        return True
    if now_s - last.when_s < min(LONGEST_S, AGAIN_S * 2**changes):
        return False
    ratio = standing.step_s / last.standing.step_s
    otherwise = not 1 / CHANGED < ratio < CHANGED or (standing.told and not last.standing.told)
    return new_group or last.refused or otherwise or not same_for_planning(alike(last.view, view), view)


def lately(records: Sequence[Metrics]) -> Sequence[Metrics]:
    """The newest training records: of LATELY_S, and of LATELY_RUNS runs, where there are so many."""
    total_s, run_s, runs = 0.0, 0.0, 0
    for at in range(len(records) - 1, 0, -1):
        before, after = records[at - 1], records[at]
        if before.stage == after.stage == "train" and after.time > before.time:
            run_s += after.time - before.time
            total_s += after.time - before.time
        if run_s >= RUN_S:
            run_s, runs = 0.0, runs + 1
        if total_s >= LATELY_S and runs >= LATELY_RUNS:
            return records[at - 1 :]
    return records


def alike(before: ClusterView, now: ClusterView) -> ClusterView:
    """`before` with the links that are about as they were: probes are never exactly equal."""
    links = {
        pair: now.links[pair] if pair in now.links and _alike(link, now.links[pair]) else link
        for pair, link in before.links.items()
    }
    return ClusterView(before.nodes, links, before.learned, before.apart)


def _alike(before: LinkEstimate, now: LinkEstimate) -> bool:
    faster = now.bandwidth_bytes_per_s / max(before.bandwidth_bytes_per_s, 1e-9)
    longer = now.rtt_s / max(before.rtt_s, 1e-9)
    return before.network == now.network and 1 / CHANGED < faster < CHANGED and 1 / LONGER < longer < LONGER
