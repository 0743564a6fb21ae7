"""The session stream: a node's messages in, the control loop's decisions out. gRPC on one side, events on the other."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import structlog

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
from protos.capacity import Capacity
from protos.errors import AccessError, DeadlineExceeded, ErrorCode, HiveError, SpecError, Unreachable
from protos.gen import membership_pb2 as pb
from protos.gen import membership_pb2_grpc, work_pb2
from protos.ids import Fence, JobId, NodeId
from protos.states import Activity, AttemptState
from protos.version import negotiate
from protos.work import Checkpoint, HeldLease, Outcome, Progress

log = structlog.get_logger()


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
    ) -> None:
        self._authority = authority
        self._controller = controller
        self._sessions = sessions
        self._rendezvous = rendezvous
        self._store = store
        self._folders = folders

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewReply:
        return enrolment.renew(self._authority, request, context, time.time())

    async def Probe(self, request: pb.Echo, context: Any) -> pb.Echo:
        return request

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        who = caller(context)
        messages = aiter(request_iterator)
        try:
            async with asyncio.timeout(limits.CALL_DEADLINE_S):
                first = await anext(messages)
        except (TimeoutError, StopAsyncIteration):
            raise DeadlineExceeded("the node did not say hello") from None
        if first.WhichOneof("body") != "hello":
            raise SpecError("a session begins with hello", "is the node a different version?")
        hello = first.hello
        agreement = negotiate(f"node {hello.name}", hello.protocol, hello.minimum_protocol)
        if agreement.protocol is None:
            raise Unreachable(agreement.reason, code=ErrorCode.VERSION_MISMATCH)
        node_id = NodeId(who.id)
        session = Session(node_id, hello.name, hello.spool_id, documents.decode(Capacity, hello.capacity_json))
        leases = documents.decode(tuple[HeldLease, ...], hello.leases_json or b"[]")
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
        activity = Activity(hello.activity or Activity.IDLE)
        await self._controller.describe_node(node_id, hello.name, session.capacity)
        await self._controller.post(e.NodeConnected(node_id, hello.name, activity, hello.activity_reason, leases))
        try:
            async with asyncio.TaskGroup() as group:
                calls: set[asyncio.Task[None]] = set()
                reader = group.create_task(self._read(session, messages, calls))
                await self._write(session, context)
                reader.cancel()
                for call in calls:
                    call.cancel()
        except* (StopAsyncIteration, ConnectionError):
            pass
        finally:
            if self._sessions.remove(session):
                await asyncio.shield(self._controller.post(e.NodeDisconnected(node_id)))

    async def _write(self, session: Session, context: Any) -> None:
        while (message := await session.outgoing.get()) is not None:
            await context.write(message)

    async def _read(self, session: Session, messages: Any, calls: set[asyncio.Task[None]]) -> None:
        try:
            async for message in messages:
                self._controller.heard(session.node_id)
                body = message.WhichOneof("body")
                match body:
                    case "heartbeat":
                        await self._heartbeat(session, message.heartbeat)
                    case "durable":
                        await self._durable(session, message.durable)
                    case "store_call":
                        call = asyncio.create_task(self._store_call(session, message.store_call))
                        calls.add(call)
                        call.add_done_callback(calls.discard)
                    case "capacity_json":
                        session.capacity = documents.decode(Capacity, message.capacity_json)
                        await self._controller.describe_node(session.node_id, session.name, session.capacity)
                    case "file_answer":
                        self._sessions.answer_files(session.node_id, message.file_answer)
                    case "task_result":
                        self._sessions.answer_task(session.node_id, message.task_result)
                    case "leaving":
                        leaving = message.leaving
                        await self._controller.post(e.NodeLeft(session.node_id, leaving.for_good, leaving.reason))
                    case _:
                        log.warning("unknown message", node=session.name, body=body)
        finally:
            session.close()

    async def _heartbeat(self, session: Session, beat: pb.Heartbeat) -> None:
        session.send(pb.CoordinatorMessage(echo=pb.HeartbeatEcho(number=beat.number, sent_s=beat.sent_s)))
        node = self._controller.state.nodes.get(session.node_id)
        activity = Activity(beat.activity or Activity.IDLE)
        if node is not None and (node.activity, node.reason) != (activity, beat.activity_reason):
            await self._controller.post(e.NodeHeard(session.node_id, activity, beat.activity_reason))

    async def _durable(self, session: Session, message: pb.Durable) -> None:
        accept = Accept(session.node_id, session.spool_id, message.seq)
        try:
            await self._accept(session, message, accept)
        except Duplicate:
            pass
        except HiveError as error:
            if error.code is ErrorCode.EXHAUSTED:
                log.error("cannot make durable", error=error.message)
                return  # not acknowledged: the node keeps it and sends it again
            log.warning("refused", node=session.name, error=error.message)
            with contextlib.suppress(Duplicate):
                await self._store.commit(accept)
        session.send(pb.CoordinatorMessage(acknowledged=pb.Acknowledged(seq=message.seq)))

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
                checkpoint = documents.decode(Checkpoint, message.checkpoint_json)
                await self._controller.checkpointed(job_id, fence, checkpoint, accept)
            case "logs":
                if job_id not in self._controller.state.jobs:
                    raise HiveError("output of a job that has ended", code=ErrorCode.STALE_FENCE)
                if await self._store.accepted(session.node_id, session.spool_id) < message.seq:
                    self._folders.append_log(job_id, rank, message.logs.lines)
                await self._store.commit(accept)
            case other:
                raise SpecError(f"unknown durable message {other}")

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
        event = e.Progressed(session.node_id, job_id, fence, progress.step, progress.samples)
        await self._controller.post(event, *writes)

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
                min(call.deadline_s, 3600.0),
                f"{session.spool_id}/{call.call_id}",
            )
        except DeadlineExceeded as error:
            reply.status, reply.message = "timeout", error.message
        except (HiveError, ValueError) as error:
            reply.status, reply.message = "refused", str(error)
        session.send(pb.CoordinatorMessage(store_reply=reply))


__all__ = ["AccessError", "MembershipService"]
