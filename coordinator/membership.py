"""The session stream: a node's messages in, the control loop's decisions out. gRPC on one side, events on the other.

Invariants: messages of a spool are made durable in order, none is skipped; what a node says counts only for ranks that
were given to it; nothing a node says ends more than its own stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from coordinator import enrolment
from coordinator.authority import Authority
from coordinator.control import events as e
from coordinator.controller import Controller
from coordinator.interceptors import caller
from coordinator.job_folder import JobFolders
from coordinator.rendezvous import Rendezvous
from coordinator.sessions import Session, Sessions
from coordinator.store.protocol import Accept, AppendEvent, Duplicate, Store, Write
from protos import documents, limits
from protos.artifact import Manifest, check_manifest
from protos.capacity import Capacity
from protos.errors import (
    TABLE,
    AccessError,
    Blame,
    Conflict,
    DeadlineExceeded,
    ErrorCode,
    HiveError,
    NotFound,
    SpecError,
    Unreachable,
)
from protos.gen import membership_pb2 as pb
from protos.gen import membership_pb2_grpc, work_pb2
from protos.ids import Fence, JobId, NodeId
from protos.log import Log
from protos.partial_file import disk_error
from protos.roster import key_sha256
from protos.states import Activity, AttemptState, Reason
from protos.version import negotiate
from protos.work import Checkpoint, Checkpoints, Fault, HeldLease, Outcome, Progress

log = Log("hive.coordinator.membership")

_MAX_OPEN_CALLS = 1024
_LONGEST_CALL_S = 3600.0


class MembershipService(membership_pb2_grpc.MembershipServicer):
    """Membership.Attach and Renew."""

    def __init__(
        self,
        authority: Authority,
        controller: Controller,
        sessions: Sessions,
        rendezvous: Rendezvous,
        store: Store,
        folders: JobFolders,
        replaced: Callable[[JobId, Manifest], None],
    ) -> None:
        self._authority = authority
        self._controller = controller
        self._sessions = sessions
        self._rendezvous = rendezvous
        self._store = store
        self._folders = folders
        self._replaced = replaced  # told of a checkpoint when there is a newer one

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewReply:
        return enrolment.renew(self._authority, request, context, time.time())

    async def Probe(self, request: pb.Echo, context: Any) -> pb.Echo:
        return request

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        who = caller(context)
        messages = aiter(request_iterator)
        hello = await _hello(messages)
        agreement = negotiate(f"node {hello.name}", hello.protocol, hello.minimum_protocol)
        if agreement.protocol is None:
            raise Unreachable(agreement.reason, code=ErrorCode.VERSION_MISMATCH)
        node_id = NodeId(who.id)
        session = Session(node_id, hello.name, hello.spool_id, documents.decode(Capacity, hello.capacity_json))
        if hello.peers:
            session.key_sha256 = key_sha256(context.auth_context()["x509_pem_cert"][0])
        leases = documents.decode(tuple[HeldLease, ...], hello.leases_json or b"[]")
        activity = _activity(hello.activity)
        acknowledged = await self._store.accepted(node_id, hello.spool_id)
        session.send(
            pb.CoordinatorMessage(
                welcome=pb.Welcome(
                    protocol=agreement.protocol,
                    node_id=node_id,
                    heartbeat_s=limits.HEARTBEAT_S,
                    lease_ttl_s=limits.LEASE_TTL_S,
                    acknowledged_seq=acknowledged,
                )
            )
        )
        self._sessions.add(session)
        try:
            await self._controller.describe_node(node_id, hello.name, session.capacity)
            await self._controller.post(e.NodeConnected(node_id, hello.name, activity, hello.activity_reason, leases))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(session, messages, group))
                await self._write(session, context)
                raise _Closed
        except* _Closed:
            pass
        except* HiveError as failures:
            raise _first(failures) from None
        finally:
            if self._sessions.remove(session):
                await self._gone(node_id)

    async def _gone(self, node_id: NodeId) -> None:
        try:
            await self._controller.post(e.NodeDisconnected(node_id))
        except HiveError as error:  # its silence will be noticed too
            log.warning("disconnect not recorded", node=node_id, reason=error.message)

    async def _write(self, session: Session, context: Any) -> None:
        while (message := await session.outgoing.get()) is not None:
            await context.write(message)

    async def _read(self, session: Session, messages: Any, group: asyncio.TaskGroup) -> None:
        try:
            async for message in messages:
                await self.take(session, message, group)
        finally:
            session.close()

    async def take(self, session: Session, message: pb.NodeMessage, group: asyncio.TaskGroup) -> None:
        """One message of a stream. What a closed one still had in its buffer is out of date (its node may have said
        hello on a newer one since) and is dropped: what must not be lost is in the node's spool and comes again."""
        if session.closed:
            return
        self._controller.heard(session.node_id)
        body = message.WhichOneof("body")
        match body:
            case "heartbeat":
                await self._heartbeat(session, message.heartbeat)
            case "durable":
                await self._durable(session, message.durable)
            case "store_call":
                self._begin_store_call(session, message.store_call, group)
            case "capacity_json":
                session.capacity = documents.decode(Capacity, message.capacity_json)
                await self._controller.describe_node(session.node_id, session.name, session.capacity)
            case "file_answer":
                self._sessions.answer_files(session.node_id, message.file_answer)
            case "task_result":
                self._sessions.answer_task(session.node_id, message.task_result)
            case "probe_result":
                self._sessions.answer_probe(session.node_id, message.probe_result)
            case "leaving":
                leaving = message.leaving
                await self._controller.post(e.NodeLeft(session.node_id, leaving.for_good, leaving.reason))
            case _:
                log.warning("unknown message", node=session.name, body=body)

    async def _heartbeat(self, session: Session, beat: pb.Heartbeat) -> None:
        session.send(pb.CoordinatorMessage(echo=pb.HeartbeatEcho(number=beat.number, sent_s=beat.sent_s)))
        node = self._controller.state.nodes.get(session.node_id)
        activity = _activity(beat.activity)
        if node is not None and (node.activity, node.reason) != (activity, beat.activity_reason):
            await self._controller.post(e.NodeHeard(session.node_id, activity, beat.activity_reason))

    async def _durable(self, session: Session, message: pb.Durable) -> None:
        """Acknowledge what is durable, and only in order: acknowledging a number gives up every lower one.

        What cannot be made durable now (a full disk) ends the stream: the node connects again and goes on from there.
        What can never be is refused for good, so that it does not hold up what follows.
        """
        accept = Accept(session.node_id, session.spool_id, message.seq)
        try:
            await self._accept(session, message, accept)
        except Duplicate:
            pass
        except OSError as error:
            raise disk_error(error, Path(str(error.filename or message.job_id))) from error
        except Exception as error:
            if isinstance(error, HiveError) and TABLE[error.code].retryable:
                raise
            await self._refuse(session, message, accept, error)
        session.send(pb.CoordinatorMessage(acknowledged=pb.Acknowledged(seq=message.seq)))

    async def _refuse(self, session: Session, message: pb.Durable, accept: Accept, error: Exception) -> None:
        if isinstance(error, HiveError):
            log.warning("refused", node=session.name, job=message.job_id, error=error.message)
        else:
            log.exception("refused", node=session.name, job=message.job_id)
        with contextlib.suppress(Duplicate):
            if message.report.outcome_json and not isinstance(error, AccessError):
                with contextlib.suppress(Conflict):  # the state is as it was: say at least that the attempt is over
                    await self._controller.post(_unreadable(session, message, str(error)), accept)
                    return
            await self._store.commit(accept)

    async def _accept(self, session: Session, message: pb.Durable, accept: Accept) -> None:
        job_id, fence, rank = JobId(message.job_id), Fence(message.fence), int(message.rank)
        known = job_id in self._controller.state.jobs
        if known and not self._controller.is_given(session.node_id, job_id, fence, rank):
            raise AccessError(f"rank {rank} of {job_id} at fence {fence} is not this node's", code=ErrorCode.FORBIDDEN)
        match message.WhichOneof("body"):
            case "report":
                outcome = None
                if message.report.outcome_json:
                    outcome = documents.decode(Outcome, message.report.outcome_json)
                state = AttemptState(message.report.state)
                event = e.AttemptReported(session.node_id, job_id, fence, rank, state, outcome)
                reason = await self._controller.post(event, accept)
                log.info("report", job=job_id, node=session.name, state=state.value, reason=reason)
            case "progress_json":
                await self._progress(session, job_id, fence, rank, message.progress_json, accept)
            case "checkpoint_json":
                checkpoint = replace(documents.decode(Checkpoint, message.checkpoint_json), fence=fence)
                check_manifest(checkpoint.manifest)
                before = self._checkpoint(job_id)
                await self._controller.checkpointed(job_id, fence, checkpoint, accept)
                if before is not None and before != self._checkpoint(job_id):
                    self._replaced(job_id, before.manifest)
            case "logs":
                if not known:
                    raise HiveError("output of a job that has ended", code=ErrorCode.STALE_FENCE)
                if await self._store.accepted(session.node_id, session.spool_id) < message.seq:
                    self._folders.append_log(job_id, rank, message.logs.lines)
                await self._store.commit(accept)
            case other:
                raise SpecError(f"unknown durable message {other}")

    def _checkpoint(self, job_id: JobId) -> Checkpoint | None:
        try:
            document = self._controller.record(job_id).checkpoint_json
        except NotFound:
            return None
        return documents.decode(Checkpoints, document).newest if document else None

    async def _progress(
        self, session: Session, job_id: JobId, fence: Fence, rank: int, document: bytes, accept: Accept
    ) -> None:
        progress = documents.decode(Progress, document)
        writes: list[Write] = [accept]
        if rank == 0 and self._controller.is_current(job_id, fence) and progress.metrics:
            self._folders.append_metrics(job_id, progress.metrics)
            last = progress.metrics[-1]
            payload = {
                "step": progress.step,
                "steps_total": progress.steps_total,
                "epoch": progress.epoch,
                "epochs_total": progress.epochs_total,
                "stage": progress.stage,
                "samples": progress.samples,
                "loss": last.loss,
                "accuracy": last.accuracy,
                "samples_per_s": last.samples_per_s,
                "bytes_sent": last.bytes_sent,
                "rank": rank,
                "node": session.name,
            }
            writes.append(AppendEvent("progress", job_id, session.node_id, payload))
            self._controller.note_progress(job_id, payload)
        if progress.step_times is not None and self._controller.is_given(session.node_id, job_id, fence, rank):
            self._controller.note_step_times(job_id, fence, rank, progress.step_times)
        event = e.Progressed(session.node_id, job_id, fence, progress.step, progress.samples)
        await self._controller.post(event, *writes)

    def _begin_store_call(self, session: Session, call: work_pb2.StoreCall, group: asyncio.TaskGroup) -> None:
        if session.open_calls >= _MAX_OPEN_CALLS:
            refusal = work_pb2.StoreReply(call_id=call.call_id, status="refused", message="too many calls at once")
            session.send(pb.CoordinatorMessage(store_reply=refusal))
            return
        session.open_calls += 1
        group.create_task(self._store_call(session, call))

    async def _store_call(self, session: Session, call: work_pb2.StoreCall) -> None:
        reply = work_pb2.StoreReply(call_id=call.call_id, status="ok")
        try:
            if not self._controller.takes_part(session.node_id, JobId(call.job_id), Fence(call.fence)):
                raise HiveError(f"this node is not in the group of {call.job_id}", code=ErrorCode.STALE_FENCE)
            reply.value, reply.number = await self._rendezvous.call(
                JobId(call.job_id),
                Fence(call.fence),
                call.operation,
                list(call.keys),
                call.value,
                call.expected,
                call.amount,
                min(call.deadline_s, _LONGEST_CALL_S) if call.deadline_s > 0 else 0.0,  # not a number: 0
                f"{session.spool_id}/{call.call_id}",
            )
        except DeadlineExceeded as error:
            reply.status, reply.message = "timeout", error.message
        except (HiveError, ValueError) as error:
            reply.status, reply.message = "refused", str(error)
        finally:
            session.open_calls -= 1
        session.send(pb.CoordinatorMessage(store_reply=reply))


async def _hello(messages: Any) -> pb.Hello:
    try:
        async with asyncio.timeout(limits.CALL_DEADLINE_S):
            first: pb.NodeMessage = await anext(messages)
    except (TimeoutError, StopAsyncIteration):
        raise DeadlineExceeded("the node did not say hello") from None
    if first.WhichOneof("body") != "hello":
        raise SpecError("a session begins with hello", "is the node a different version?")
    return first.hello


def _activity(text: str) -> Activity:
    try:
        return Activity(text or Activity.IDLE)
    except ValueError:
        raise SpecError(f"there is no activity {text[:40]!r}", "is the node a different version?") from None


def _unreadable(session: Session, message: pb.Durable, why: str) -> e.AttemptReported:
    """A report that cannot be taken still ends its attempt: nothing else would."""
    text = f"the report of {session.name} cannot be read: {why}"
    fault = Fault(Reason.INTERNAL, Blame.COORDINATOR, text, "do both run the same version of hive?")
    outcome = Outcome(AttemptState.FAILED, fault=fault)
    job_id, fence = JobId(message.job_id), Fence(message.fence)
    return e.AttemptReported(session.node_id, job_id, fence, int(message.rank), AttemptState.FAILED, outcome)


class _Closed(Exception):
    """Leaves the task group of one session."""


def _first(failures: BaseExceptionGroup[HiveError]) -> HiveError:
    error = failures.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


__all__ = ["MembershipService"]
