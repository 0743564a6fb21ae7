"""What the control loop asks for, done: identification asked of nodes, offers and stops sent, choices written down.

Effects run after the transaction that caused them. Whatever is lost on the way (a node that just went away) is decided
again by the control loop; nothing here retries by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from coordinator import learning, unplaced
from coordinator.blobs import BlobStore
from coordinator.cluster import nobody
from coordinator.control import events as e
from coordinator.control.state import AttemptView, Generation, JobView
from coordinator.controller import Controller
from coordinator.decompose import Inputs, decompose
from coordinator.identification import Identifier, Refusal
from coordinator.job_folder import JobFolders
from coordinator.learning import Learner
from coordinator.memory_needs import running_out
from coordinator.peers import Peers
from coordinator.placement import Placement
from coordinator.records import Attempt, Job
from coordinator.rendezvous import Rendezvous
from coordinator.result import conclude, nothing_left
from coordinator.sessions import Sessions
from coordinator.store.protocol import AppendEvent, Store, Write
from coordinator.submission import of_record
from protos import documents, limits
from protos.errors import TABLE, Blame, HiveError
from protos.gen import membership_pb2 as pb
from protos.gen import work_pb2
from protos.ids import JobId, NodeId
from protos.log import Log
from protos.plan import Identification
from protos.states import TERMINAL_JOB_STATES, AttemptState, Reason
from protos.work import Checkpoints, Fault, Resume
from strategies.memory import granted_bytes

log = Log("hive.coordinator.effects")


class Effects:
    """Performs effects; `controller` is set once, because each needs the other."""

    controller: Controller

    def __init__(
        self,
        store: Store,
        sessions: Sessions,
        rendezvous: Rendezvous,
        identifier: Identifier,
        placement: Placement,
        learner: Learner,
        folders: JobFolders,
        blobs: BlobStore,
        peers: Peers,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._rendezvous = rendezvous
        self._identifier = identifier
        self._placement = placement
        self._learner = learner
        self._folders = folders
        self._blobs = blobs
        self._peers = peers
        self._tasks = tasks
        self._identifying: dict[JobId, asyncio.Task[None]] = {}
        self._tracebacks: dict[JobId, tuple[str, ...]] = {}  # of models that failed to build, until their job's end

    def perform(self, effect: e.Effect) -> None:
        match effect:
            case e.Identify(job_id):
                self._begin_identifying(job_id)
            case e.StopIdentifying(job_id):
                self._stop_identifying(job_id)
            case e.Offer():
                self._offer(effect)
            case e.Stop(node_id, job_id, fence, mode, reason):
                stop = work_pb2.Stop(job_id=job_id, fence=fence, mode=mode.value, reason=reason)
                self._sessions.send(node_id, pb.CoordinatorMessage(stop=stop))
            case e.CloseRendezvous(job_id, fence):
                self._background(self._rendezvous.close(job_id, fence))
                self._background(self._caught_up())  # the next group is planned with what this one has taught
            case e.Finish(job_id):
                self._stop_identifying(job_id)
                self._background(self._finish(job_id))

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._tasks.create_task(self._guarded(work))

    def _begin_identifying(self, job_id: JobId) -> None:
        """Once at a time for a job: asked again while it is under way, it goes on."""
        if job_id in self._identifying:
            return
        task = self._identifying[job_id] = self._background(self._identify(job_id))

        def over(task: asyncio.Task[None]) -> None:
            if self._identifying.get(job_id) is task:
                del self._identifying[job_id]

        task.add_done_callback(over)

    def _stop_identifying(self, job_id: JobId) -> None:
        task = self._identifying.pop(job_id, None)
        if task is not None:
            task.cancel()

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            log.exception("an effect failed")

    async def _identify(self, job_id: JobId) -> None:
        controller = self.controller
        if job_id not in controller.state.jobs:
            return  # ended meanwhile
        try:
            submission = of_record(controller.record(job_id))
        except HiveError as error:  # written by another version
            await controller.post(e.Refused(job_id, Reason.INTERNAL, Blame.COORDINATOR, error.message, error.hint))
            return
        idle = controller.state.idle()
        nodes = (*idle, *(node for node in controller.state.willing() if node not in idle))
        try:
            why, _ = nobody(controller.state.nodes.values())
            found = await self._identifier.identify(submission, job_id, nodes, why)
        except Refusal as refusal:
            blame = refusal.blame or Blame.USER_CODE
            self._tracebacks[job_id] = refusal.details
            await asyncio.to_thread(self._folders.append_log, job_id, 0, refusal.details)
            await controller.post(e.Refused(job_id, refusal.reason, blame, refusal.message, refusal.hint))
        except HiveError as error:
            await controller.post(e.IdentificationDelayed(job_id, error.message))
        else:
            self._placement.know(job_id, submission, found)
            document = documents.encode(found)
            await controller.post(e.Identified(job_id), change=lambda job: replace(job, profile_json=document))
            if job_id not in controller.state.jobs or controller.state.jobs[job_id].ended:
                self._placement.forget(job_id)

    def _offer(self, effect: e.Offer) -> None:
        controller = self.controller
        job = controller.state.jobs[effect.job_id]
        known = self._placement.known(effect.job_id)
        if job.plan is None or known is None:
            raise ValueError(f"{effect.job_id} is offered before it was planned")
        files = known.submission
        record = controller.record(effect.job_id)
        resume = None
        if record.checkpoint_json:
            newest = documents.decode(Checkpoints, record.checkpoint_json).newest
            resume = Resume(newest.step, newest.manifest) if newest is not None else None
        inputs = Inputs(files.code, files.data, files.test, files.weights, known.found.data.digest)
        manifests = (files.code, files.data, files.test, files.weights, resume.manifest if resume else None)
        nodes = [subtask.node_id for subtask in sorted(job.plan.subtasks, key=lambda subtask: subtask.rank)]
        self._peers.admit(effect.job_id, effect.fence, nodes, [each for each in manifests if each is not None])
        tasks = decompose(job.plan, files.spec, effect.job_id, effect.fence, inputs, resume)
        task = next(task for task in tasks if task.rank == effect.rank)
        offer = work_pb2.Offer(task_json=documents.encode(task), ttl_s=limits.LEASE_TTL_S)
        self._sessions.send(effect.node_id, pb.CoordinatorMessage(offer=offer))

    async def _finish(self, job_id: JobId) -> None:
        self._placement.forget(job_id)
        self._tracebacks.pop(job_id, None)
        self.controller.forget(job_id)
        await self._caught_up()

    async def _caught_up(self) -> None:
        await self._learner.catch_up(self._store)

    def take_up(self) -> None:
        """After a restart: what the records know of identified jobs."""
        for job_id in self.controller.state.jobs:
            record = self.controller.record(job_id)
            if record.profile_json:
                try:
                    found = documents.decode(Identification, record.profile_json)
                    self._placement.know(job_id, of_record(record), found)
                except (
                    HiveError
                ) as error:  # written by another version: the job ends with that reason when it is placed
                    log.error("job cannot be read", job=job_id, reason=error.message)

    async def supplement(
        self, before: JobView | None, after: JobView, record: Job, attempts: Sequence[Attempt]
    ) -> tuple[Job, Sequence[Write]]:
        """coordinator.controller.Supplement: a decision beside a new plan, the result beside the end."""
        writes: list[Write] = []
        known = self._placement.known(after.job_id)
        if after.left is not None:
            try:
                writes.append(await self._left(after.job_id, after.left))
            except Exception:  # whatever a node said of it, the job must go on
                log.exception("a group teaches nothing", job=after.job_id)
        try:
            writes += self._out_of_memory(before, after)
        except Exception:  # as above
            log.exception("running out of memory teaches nothing", job=after.job_id)
        planned = before.plan.id if before is not None and before.plan is not None else None
        if after.plan is not None and known is not None and planned != after.plan.id:
            replanned = after.fence > 1
            payload = learning.decision_payload(
                after.plan, known.submission.spec, known.found.profile, known.found.data, replanned=replanned
            )
            writes.append(AppendEvent(learning.DECISION, after.job_id, None, payload))
        if after.state in TERMINAL_JOB_STATES and (before is None or not before.ended):
            if after.plan is None and (candidates := self._placement.refused(after.job_id)):
                writes.append(AppendEvent(unplaced.UNPLACED, after.job_id, None, unplaced.payload(candidates)))
            metrics = await asyncio.to_thread(self._folders.metrics, after.job_id)
            now_s = record.finished_s or record.updated_s
            progress = self.controller.progress(after.job_id)
            lines = self._tracebacks.get(after.job_id, ())
            try:
                result = await conclude(
                    after, record, attempts, metrics, self.names(), progress, self._blobs.put_bytes, now_s, lines
                )
            except Exception as error:
                if isinstance(error, HiveError) and TABLE[error.code].retryable:
                    raise  # a full disk: the job ends when there is space
                log.exception("no result", job=after.job_id)  # whatever it was, the job must be able to end
                result = nothing_left(lines)
            record = replace(record, result_json=result.document)
            writes += result.writes
        return record, writes

    async def _left(self, job_id: JobId, left: Generation) -> Write:
        """What a group measured that gave way to another plan."""
        usages = [(each.rank, each.outcome.usage) for each in left.attempts if each.outcome and each.outcome.usage]
        metrics = await asyncio.to_thread(self._folders.recent_metrics, job_id, left.first_step)
        measured = learning.measure(
            [usage for _, usage in usages],
            metrics,
            finished=all(each.state is not AttemptState.LOST for each in left.attempts),
            ranks=[rank for rank, _ in usages],
            generations=int(left.fence),
        )
        payload = learning.outcome_payload(left.plan, measured)
        return AppendEvent(learning.TRIAL, job_id, None, payload)

    def _out_of_memory(self, before: JobView | None, after: JobView) -> list[Write]:
        """An event for each rank of the group before this change whose memory did not suffice, as this change says.

        A plan counts on a GPU's memory where there is one: a worker that its node ended for what it took of the main
        memory says nothing of that."""
        now: JobView | Generation = after.left or after
        if before is None or before.plan is None or before.fence != now.fence:
            return []
        known = {attempt.rank for attempt in before.attempts if ran_out(attempt)}
        writes: list[Write] = []
        for attempt in now.attempts:
            capacity = self.controller.capacity(attempt.node_id)
            if capacity is None or attempt.rank in known or (fault := ran_out(attempt)) is None:
                continue
            if capacity.gpus and fault.blame is Blame.POLICY:
                continue
            lesson = running_out(before.plan, attempt.node_id, granted_bytes(capacity))
            if lesson is not None:
                writes.append(AppendEvent(learning.OUT_OF_MEMORY, after.job_id, attempt.node_id, lesson))
        return writes

    def names(self) -> dict[NodeId, str]:
        return {node_id: node.name for node_id, node in self.controller.state.nodes.items()}


def ran_out(attempt: AttemptView) -> Fault | None:
    """The fault of an attempt that ended because its memory did not suffice."""
    fault = attempt.outcome.fault if attempt.outcome is not None else None
    return fault if fault is not None and fault.reason is Reason.OUT_OF_MEMORY else None


__all__ = ["Effects"]
