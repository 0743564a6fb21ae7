"""The Jobs service: what people and programs ask. gRPC in, decisions and documents out; nothing is computed here."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coordinator import unplaced, views
from coordinator.access import Caller
from coordinator.answers import answer, fitting, whole_steps
from coordinator.blobs import BlobStore
from coordinator.cluster import apart, nobody
from coordinator.control import events as e
from coordinator.controller import Controller
from coordinator.doctor import Doctor
from coordinator.event_tail import EventTail
from coordinator.hindsight import TOLD, Told, hindsight
from coordinator.identification import Identifier
from coordinator.interceptors import caller
from coordinator.job_folder import JobFolders
from coordinator.join_token import JoinToken
from coordinator.log_follow import follow_logs
from coordinator.placement import Placement
from coordinator.records import Event, Job
from coordinator.sessions import Sessions
from coordinator.store.protocol import Store
from coordinator.submission import Submission, of_model, of_request
from coordinator.token_book import TokenBook
from protos import documents, jobspec
from protos.artifact import Manifest, check_manifest
from protos.capacity import Capacity
from protos.errors import AccessError, Conflict, ErrorCode, NoPlacement, NotFound, SpecError
from protos.gen import jobs_pb2, jobs_pb2_grpc
from protos.ids import JobId, NodeId, new_job_id
from protos.plan import Identification, NodeView, Plan
from protos.states import TERMINAL_JOB_STATES, Activity, JobState, Reason
from protos.token import Role
from strategies.links import Apart

_LOCATE_S = 10.0
_EVENT_PAGE = 500
_EVENT_WAIT_S = 30.0


@dataclass(slots=True)
class JobsService(jobs_pb2_grpc.JobsServicer):
    store: Store
    controller: Controller
    sessions: Sessions
    identifier: Identifier
    placement: Placement
    folders: JobFolders
    blobs: BlobStore
    tokens: TokenBook
    doctor: Doctor
    tail: EventTail
    join_token: JoinToken
    lan: Callable[[], Sequence[dict[str, Any]]]
    token_text: Callable[[str], str]  # of a secret
    join_command: Callable[[str, Role], str]

    # ---- cluster

    async def Nodes(self, request: jobs_pb2.NodesRequest, context: Any) -> jobs_pb2.Document:
        members = sorted(self.controller.state.nodes.values(), key=lambda node: (not node.reachable, node.name))
        content: dict[str, Any] = {"links": views.links(self.sessions.links)}
        if request.lan:
            content |= {"lan": await self._lan(caller(context).role), "lan_problem": self.doctor.lan_obstacle()}
        separate = self._apart()
        return answer(**fitting("nodes", [self._node(node.node_id, separate) for node in members], **content))

    def _apart(self) -> Apart:
        """Of the connected nodes, those that cannot be in one group."""
        return apart(self.sessions, [self.sessions[node_id] for node_id in sorted(self.sessions)])

    async def _lan(self, role: Role) -> list[dict[str, Any]]:
        """Machines seen by zeroconf; an administrator gets the whole command for those that have not joined."""
        seen = list(self.lan())
        apart = [machine for machine in seen if not machine["joined"]]
        if apart and role is Role.ADMIN:
            command = self.join_command(self.token_text(await self.join_token.secret()), Role.NODE)
            return [{**machine, "join": "" if machine["joined"] else command} for machine in seen]
        return seen

    def _node(self, node_id: NodeId, separate: Apart) -> dict[str, Any]:
        state = self.controller.state
        status = state.nodes[node_id]
        session = self.sessions.get(node_id)
        capacity = session.capacity if session else self.controller.capacity(node_id)
        activity, reason = status.activity, status.reason
        if node_id in state.busy() and activity is Activity.IDLE:
            activity = Activity.BUSY
        view = NodeView(node_id, status.name, capacity or _UNKNOWN, status.link, status.eligibility, activity, reason)
        names = self._names()
        others = {
            names.get(other, other): why
            for pair, why in separate.items()
            if node_id in pair
            for other in pair
            if other != node_id
        }
        return views.node(view, capacity, self.placement.learned_of(node_id), others)

    async def ControlNode(self, request: jobs_pb2.NodeControlRequest, context: Any) -> jobs_pb2.Document:
        node_id = self._find_node(request.node_id)
        await self.controller.post(e.NodeControlled(node_id, request.action))
        if request.action == "remove":
            session = self.sessions.get(node_id)
            if session is not None:
                session.close()
        return answer(node=self._node(node_id, self._apart()))

    def _find_node(self, named: str) -> NodeId:
        """By id, or by a name that only one node has."""
        nodes = self.controller.state.nodes
        if NodeId(named) in nodes:
            return NodeId(named)
        found = [node_id for node_id, node in nodes.items() if node.name == named]
        if len(found) == 1:
            return found[0]
        if found:
            raise SpecError(f"{len(found)} nodes are called {named}", "use the id", code=ErrorCode.USAGE)
        raise NotFound(f"no node {named}", "hive nodes lists them")

    async def Doctor(self, request: jobs_pb2.ListRequest, context: Any) -> jobs_pb2.Document:
        return answer(checks=await self.doctor.checks())

    # ---- jobs

    async def Plan(self, request: jobs_pb2.SubmitRequest, context: Any) -> jobs_pb2.Document:
        submission = of_request(request)
        found, nodes = await self._identified(submission, "plan")
        made = await self.placement.plan_now(submission, found, nodes)
        return answer(**views.plan(made, found, _LAYERS_SHOWN, self._names()))

    async def Identify(self, request: jobs_pb2.IdentifyRequest, context: Any) -> jobs_pb2.Document:
        found, _ = await self._identified(of_model(request), "identify")
        return answer(model=views.model(found, _LAYERS_SHOWN))

    async def _identified(self, submission: Submission, what: str) -> tuple[Identification, tuple[NodeId, ...]]:
        """What a node says of it now, and the nodes that could be asked."""
        await self._check_content(submission)
        await self.identifier.check_file(submission)
        nodes = self.controller.state.willing()
        if not nodes:
            why, hint = nobody(self.controller.state.nodes.values())
            raise NoPlacement(f"there is nothing to {what} with: {why}", hint)
        return await self.identifier.identify(submission, JobId(what), nodes), nodes

    async def Submit(self, request: jobs_pb2.SubmitRequest, context: Any) -> jobs_pb2.Document:
        key = request.idempotency_key
        if len(key) > _MAX_KEY_CHARACTERS:
            raise SpecError(f"an idempotency key has at most {_MAX_KEY_CHARACTERS} characters", code=ErrorCode.USAGE)
        if (known := await self._submitted_before(key)) is not None:
            return known
        submission = of_request(request)
        await self._check_content(submission)
        await self.identifier.check_file(submission)
        now_s = time.time()
        record = Job(
            job_id=new_job_id(),
            name=submission.spec.name,
            owner=owner_of(caller(context)),
            state=JobState.SUBMITTED,
            reason=Reason.NONE,
            spec_json=jobspec.dump(submission.spec).encode(),
            created_s=now_s,
            updated_s=now_s,
            code_json=_encoded(submission.code),
            data_json=_encoded(submission.data),
            test_json=_encoded(submission.test),
            weights_json=_encoded(submission.weights),
            idempotency_key=key or None,
        )
        try:
            await self.controller.submit(record)
        except Conflict:  # the same submission, sent again, came first
            if (known := await self._submitted_before(key)) is not None:
                return known
            raise
        seq = self.store.last_seq
        made = await self.store.job(record.job_id)
        return answer(job=self._job(made or record, seq))

    async def _submitted_before(self, key: str) -> jobs_pb2.Document | None:
        seq = self.store.last_seq
        known = await self.store.job_by_idempotency_key(key) if key else None
        return answer(job=self._job(known, seq)) if known is not None else None

    async def _check_content(self, submission: Submission) -> None:
        """Every file is here, or at a path that all connected nodes see."""
        for name, manifest in submission.manifests.items():
            missing = await self.blobs.missing([entry.digest for entry in manifest.files])
            if missing and name in ("data", "test"):
                shared = await self._shared(manifest)
                missing = tuple(digest for digest in missing if digest not in shared)
            if missing:
                paths = [entry.path for entry in manifest.files if entry.digest in missing]
                raise SpecError(
                    f"the {name} file {paths[0]} was not uploaded", "submit again: hive submit uploads what is missing"
                )

    async def Locate(self, request: jobs_pb2.LocateRequest, context: Any) -> jobs_pb2.LocateReply:
        manifest = check_manifest(documents.decode(Manifest, request.manifest_json))
        missing = await self.blobs.missing([entry.digest for entry in manifest.files])
        shared = await self._shared(manifest) if missing else frozenset()
        return jobs_pb2.LocateReply(missing_digests=missing, shared_digests=sorted(shared))

    async def _shared(self, manifest: Manifest) -> frozenset[str]:
        """Digests that every connected node sees at the path they come from; nothing when no node is connected."""
        if not any(entry.origin for entry in manifest.files) or not self.sessions:
            return frozenset()
        asked = [self.sessions.who_sees(node_id, manifest, _LOCATE_S) for node_id in list(self.sessions)]
        seen = await asyncio.gather(*asked)
        return frozenset.intersection(*seen)

    async def List(self, request: jobs_pb2.ListRequest, context: Any) -> jobs_pb2.Document:
        states = None if request.all else [state for state in JobState if state not in TERMINAL_JOB_STATES]
        seq = self.store.last_seq
        found = await self.store.jobs(states, limit=min(request.limit or 100, _MAX_LISTED))
        names, now_s = self._names(), time.time()
        progress = {record.job_id: self.controller.progress(record.job_id) for record in found}

        def shown() -> dict[str, Any]:
            return fitting("jobs", [views.job(each, names, progress[each.job_id], now_s, seq) for each in found])

        return answer(**await asyncio.to_thread(shown))  # a thousand plans take a second to read

    async def Show(self, request: jobs_pb2.JobRequest, context: Any) -> jobs_pb2.Document:
        seq = self.store.last_seq
        record = await self._record(request.job_id)
        rows = await self.store.attempts(record.job_id)
        newest_first = views.attempts(reversed(rows), self._names())
        shown = fitting("attempts", newest_first, job=self._job(record, seq))
        return answer(**{**shown, "attempts": shown["attempts"][::-1]})

    async def _record(self, job_id: str) -> Job:
        record = await self.store.job(JobId(job_id))
        if record is None:
            raise NotFound(f"no job {job_id[:40]}", "hive ps --all lists all jobs")
        return record

    def _job(self, record: Job, seq: int) -> dict[str, Any]:
        """`seq`: of the newest event before the record was read, so that nothing after it is missed."""
        return views.job(record, self._names(), self.controller.progress(record.job_id), time.time(), seq)

    def _names(self) -> dict[str, str]:
        return {node_id: node.name for node_id, node in self.controller.state.nodes.items()}

    async def Explain(self, request: jobs_pb2.JobRequest, context: Any) -> jobs_pb2.Document:
        seq = self.store.last_seq
        record = await self._record(request.job_id)
        found = documents.decode(Identification, record.profile_json) if record.profile_json else None
        if record.plan_json is None:
            content = views.unplanned(await self._considered(record.job_id), found, _LAYERS_SHOWN, self._names())
        else:
            plan = documents.decode(Plan, record.plan_json)
            plan = replace(plan, spares=self.placement.spares_of(record.job_id, plan.id))
            content = views.plan(plan, found, _LAYERS_SHOWN, self._names())
        result = json.loads(record.result_json) if record.result_json else {}
        events = await self.store.events(0, record.job_id, TOLD, _EVENTS_READ)
        seen = hindsight([Told(event.kind, event.time_s, json.loads(event.payload_json)) for event in events])
        ranks = views.ranks(self.controller.times_now(record.job_id), self._names())
        return answer(
            **content, measured=result.get("measured"), hindsight=seen, ranks=ranks, job=self._job(record, seq)
        )

    async def _considered(self, job_id: JobId) -> list[dict[str, Any]]:
        """For a job without a plan: of a waiting one when it was last tried, of one that ended as it was then."""
        if candidates := self.placement.refused(job_id):
            return list(unplaced.payload(candidates)["candidates"])
        kept = await self.store.events(0, job_id, (unplaced.UNPLACED,), 1)
        return list(json.loads(kept[0].payload_json)["candidates"]) if kept else []

    async def Metrics(self, request: jobs_pb2.MetricsRequest, context: Any) -> jobs_pb2.Document:
        record = await self._record(request.job_id)
        lines = await asyncio.to_thread(self.folders.metrics, record.job_id, request.after_step)
        return answer(**await asyncio.to_thread(whole_steps, lines))

    async def Control(self, request: jobs_pb2.ControlRequest, context: Any) -> jobs_pb2.Document:
        record = await self._record(request.job_id)
        who = caller(context)
        if who.role is not Role.ADMIN and not owns(who, record.owner):
            raise AccessError(
                f"{record.job_id} belongs to {record.owner}",
                "only its owner or an administrator may stop, pause or resume it",
                code=ErrorCode.FORBIDDEN,
            )
        await self.controller.post(e.UserAsked(record.job_id, request.action))
        seq = self.store.last_seq
        return answer(job=self._job(await self._record(request.job_id), seq))

    # ---- streams

    async def Events(self, request: jobs_pb2.EventsRequest, context: Any) -> AsyncIterator[jobs_pb2.Event]:
        job_id = JobId(request.job_id) if request.job_id else None
        if job_id is not None:
            await self._record(job_id)
        after = request.after_seq
        while True:
            if request.follow:
                page = await self.tail.after(after, _EVENT_WAIT_S, job_id, _EVENT_PAGE)
            else:
                page = await self.store.events(after, job_id, limit=_EVENT_PAGE)
            for event in page:
                after = event.seq
                yield _event(event)
            if not page and not request.follow:
                return

    async def Logs(self, request: jobs_pb2.LogsRequest, context: Any) -> AsyncIterator[jobs_pb2.LogChunk]:
        await self._record(request.job_id)
        chunks = follow_logs(
            self.store, self.folders, JobId(request.job_id), request.rank, request.after_bytes, request.follow
        )
        async for chunk in chunks:
            yield chunk

    # ---- tokens

    async def CreateToken(self, request: jobs_pb2.TokenRequest, context: Any) -> jobs_pb2.Document:
        role = _role(request.role)
        token_id, secret = await self.tokens.create(role, request.uses or None, request.lifetime_s)
        token = self.token_text(secret)
        made = {
            "id": token_id,
            "token": token,
            "role": role.value,
            "uses": request.uses or None,
            "expires_s": time.time() + request.lifetime_s,
            "join": self.join_command(token, role),
        }
        return answer(token=made)

    async def ListTokens(self, request: jobs_pb2.ListRequest, context: Any) -> jobs_pb2.Document:
        now_s = time.time()
        found = [views.token(record) for record in await self.tokens.list()]
        alive = [t for t in found if not t["revoked"] and t["expires_s"] > now_s and t["uses_left"] != 0]
        return answer(tokens=found if request.all else alive)

    async def RevokeToken(self, request: jobs_pb2.RevokeRequest, context: Any) -> jobs_pb2.Document:
        await self.tokens.revoke(request.token_id)
        found = [views.token(record) for record in await self.tokens.list() if record.token_id == request.token_id]
        return answer(tokens=found)


def owner_of(who: Caller) -> str:
    """As it is written into a job's record: a name to read, and the id that decides."""
    return f"{who.name} ({who.id})" if who.name else who.id


def owns(who: Caller, owner: str) -> bool:
    return owner == who.id or owner.endswith(f"({who.id})")


_UNKNOWN = Capacity("", "", "", "", 0.0, 0, 0, 0, 0)
_MAX_LISTED = 1000
_MAX_KEY_CHARACTERS = 200
_EVENTS_READ = 10_000  # to explain a job: far more than one has
_LAYERS_SHOWN = 2000


def _encoded(manifest: Manifest | None) -> bytes | None:
    return documents.encode(manifest) if manifest is not None else None


def _event(event: Event) -> jobs_pb2.Event:
    return jobs_pb2.Event(
        seq=event.seq,
        time_unix_s=event.time_s,
        kind=event.kind,
        job_id=event.job_id or "",
        node_id=event.node_id or "",
        payload_json=event.payload_json,
    )


def _role(text: str) -> Role:
    try:
        return Role(text)
    except ValueError:
        roles = ", ".join(role.value for role in Role)
        raise SpecError(f"there is no role {text[:40]!r}", f"use one of {roles}", code=ErrorCode.USAGE) from None


__all__ = ["JobsService"]
