"""The client of a coordinator: what CLI and SDK ask, over the Jobs and Artifacts services.

Owns: one authenticated channel, a deadline on every call, and errors as HiveError. Refuses to interpret: it returns
the documents of docs/json.md as they came. A submit carries an idempotency key, so that it may be sent again until it
is answered.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc.aio

from coordinator.bundle import Bundle
from coordinator.follow import EventRecord, LogText, Patience, delay_s, resumed
from protos import dial, jobspec, limits, transfer
from protos.artifact import Manifest, check_digest, check_path
from protos.credentials import Credential
from protos.documents import encode
from protos.errors import TABLE, HiveError
from protos.gen import artifacts_pb2_grpc, jobs_pb2, jobs_pb2_grpc, qtable_pb2, qtable_pb2_grpc
from protos.states import TERMINAL_JOB_STATES

PLAN_DEADLINE_S = 180.0  # identification may have to start a worker, which imports torch
QTABLE_DEADLINE_S = 300.0  # a long log is read again
STREAM_DEADLINE_S = 3600.0  # a follower then simply opens the stream again
SUBMIT_PATIENCE_S = 10.0
ALL_RANKS = -1

UploadProgress = Callable[[int, int], None]  # bytes sent, bytes to send


T = TypeVar("T")


class Client:
    """Use as `async with Client.of(credential) as client`. Every method raises HiveError only."""

    def __init__(self, channel: grpc.aio.Channel, address: str) -> None:
        self._channel = channel
        self._address = address
        self._jobs: Any = jobs_pb2_grpc.JobsStub(channel)  # type: ignore[no-untyped-call]
        self._qtable: Any = qtable_pb2_grpc.QTableStub(channel)  # type: ignore[no-untyped-call]
        self._artifacts: Any = artifacts_pb2_grpc.ArtifactsStub(channel)  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, credential: Credential) -> Self:
        """Connects lazily: the first call says whether anybody answers."""
        return cls(dial.channel(credential.session_address, credential), credential.session_address)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close(grace=None)

    # ---- cluster

    async def nodes(self, lan: bool = False) -> dict[str, Any]:
        return await self._ask(self._jobs.Nodes, jobs_pb2.NodesRequest(lan=lan))

    async def control_node(self, node: str, action: str) -> dict[str, Any]:
        """`action`: cordon uncordon drain remove."""
        return await self._ask(self._jobs.ControlNode, jobs_pb2.NodeControlRequest(node_id=node, action=action))

    async def doctor(self) -> dict[str, Any]:
        return await self._ask(self._jobs.Doctor, jobs_pb2.ListRequest())

    async def create_token(self, role: str, uses: int, lifetime_s: float) -> dict[str, Any]:
        """`uses` 0 is unlimited."""
        request = jobs_pb2.TokenRequest(role=role, uses=uses, lifetime_s=lifetime_s)
        return await self._ask(self._jobs.CreateToken, request)

    async def tokens(self, everything: bool = False) -> dict[str, Any]:
        return await self._ask(self._jobs.ListTokens, jobs_pb2.ListRequest(all=everything))

    async def revoke_token(self, token_id: str) -> dict[str, Any]:
        return await self._ask(self._jobs.RevokeToken, jobs_pb2.RevokeRequest(token_id=token_id))

    # ---- what was learned

    async def qtable(self, action: str) -> dict[str, Any]:
        """`action`: Show Export Evaluate, and for administrators Reset Rebuild."""
        return await self._ask(getattr(self._qtable, action), qtable_pb2.QTableRequest(), QTABLE_DEADLINE_S)

    async def import_qtable(self, content: bytes, name: str) -> dict[str, Any]:
        request = qtable_pb2.QTableImport(content=content, name=name)
        return await self._ask(self._qtable.Import, request, QTABLE_DEADLINE_S)

    def decisions(self) -> AsyncIterator[dict[str, Any]]:
        """Every decision of the log with what came of it, in order."""
        return self._stream(self._qtable.Decisions, qtable_pb2.QTableRequest(), _line)

    # ---- jobs

    async def plan(self, bundle: Bundle) -> dict[str, Any]:
        """The plan that a submit would execute; what it needs travels first, because workers identify the model."""
        return await self._ask(self._jobs.Plan, _submission(bundle, ""), PLAN_DEADLINE_S)

    async def identify(self, bundle: Bundle) -> dict[str, Any]:
        """What a node finds out about a model alone (bundle.bundle_model)."""
        request = jobs_pb2.IdentifyRequest(
            model_json=bundle.spec.model.model_dump_json().encode(),
            code_json=_manifest(bundle.code),
            weights_json=_manifest(bundle.weights),
        )
        return await self._ask(self._jobs.Identify, request, PLAN_DEADLINE_S)

    async def submit(self, bundle: Bundle, key: str = "") -> dict[str, Any]:
        """The new job. Sent again while the coordinator is away: the key makes sure there is only one job."""
        request = _submission(bundle, key or secrets.token_hex(16))
        give_up = asyncio.get_running_loop().time() + SUBMIT_PATIENCE_S
        tries = 0
        while True:
            try:
                return await self._ask(self._jobs.Submit, request)
            except HiveError as error:
                if not TABLE[error.code].retryable or asyncio.get_running_loop().time() > give_up:
                    raise
            await asyncio.sleep(delay_s(tries, random.Random()))
            tries += 1

    async def list_jobs(self, everything: bool = False, limit: int = 100) -> dict[str, Any]:
        return await self._ask(self._jobs.List, jobs_pb2.ListRequest(limit=limit, all=everything))

    async def show(self, job_id: str) -> dict[str, Any]:
        return await self._ask(self._jobs.Show, jobs_pb2.JobRequest(job_id=job_id))

    async def explain(self, job_id: str) -> dict[str, Any]:
        return await self._ask(self._jobs.Explain, jobs_pb2.JobRequest(job_id=job_id))

    async def metrics(self, job_id: str, after_step: int = 0) -> dict[str, Any]:
        """All records after a step, however many messages they take."""
        records: list[dict[str, Any]] = []
        while True:
            request = jobs_pb2.MetricsRequest(job_id=job_id, after_step=after_step)
            document = await self._ask(self._jobs.Metrics, request)
            records += document["metrics"]
            if not document.get("more") or not document["metrics"]:
                return {**document, "metrics": records}
            after_step = records[-1]["step"]

    async def control(self, job_id: str, action: str) -> dict[str, Any]:
        """`action`: cancel pause resume."""
        return await self._ask(self._jobs.Control, jobs_pb2.ControlRequest(job_id=job_id, action=action))

    # ---- streams

    def events(
        self, job_id: str = "", after_seq: int = 0, follow: bool = True, patience: Patience | None = None
    ) -> AsyncIterator[EventRecord]:
        """Events after a seq, in order, each once; with `follow` across restarts of the coordinator."""

        def opened(position: int) -> AsyncIterator[EventRecord]:
            request = jobs_pb2.EventsRequest(after_seq=position, job_id=job_id, follow=follow)
            return self._stream(self._jobs.Events, request, _event)

        if not follow:
            return opened(after_seq)
        return resumed(opened, lambda event: event.seq, after_seq, patience or Patience())

    def logs(
        self,
        job_id: str,
        rank: int = 0,
        after_bytes: int = 0,
        follow: bool = False,
        patience: Patience | None = None,
    ) -> AsyncIterator[LogText]:
        """One rank's output (ALL_RANKS: of every rank); with `follow` until the job has ended."""

        def opened(position: int) -> AsyncIterator[LogText]:
            request = jobs_pb2.LogsRequest(job_id=job_id, rank=rank, follow=follow, after_bytes=position)
            return self._stream(self._jobs.Logs, request, _log_text)

        if not follow:
            return opened(after_bytes)
        return resumed(opened, lambda log: log.end_bytes, after_bytes, patience or Patience(), lambda log: log.finished)

    async def wait(
        self,
        job_id: str,
        on_event: Callable[[EventRecord], None] = lambda event: None,
        after_seq: int = 0,
        patience: Patience | None = None,
    ) -> dict[str, Any]:
        """The job's document once it has ended; on the way `on_event` sees each of its events once."""
        patience = patience or Patience()
        document = await _patiently(lambda: self.show(job_id), patience)
        if document["job"]["state"] not in TERMINAL_JOB_STATES or after_seq == 0:
            async for event in self.events(job_id, after_seq, patience=patience):
                on_event(event)
                if event.kind == "job" and event.payload.get("state") in TERMINAL_JOB_STATES:
                    break
            document = await _patiently(lambda: self.show(job_id), patience)
        return document

    # ---- files

    async def locate(self, manifest: Manifest) -> frozenset[str]:
        """Digests that must be uploaded: neither stored already nor seen by the nodes on a shared path."""
        request = jobs_pb2.LocateRequest(manifest_json=encode(manifest))
        with dial.errors_of(self._address):
            reply = await self._jobs.Locate(request, timeout=limits.CALL_DEADLINE_S)
        return frozenset(reply.missing_digests) - frozenset(reply.shared_digests)

    async def upload(self, bundle: Bundle, progress: UploadProgress = lambda sent, total: None) -> int:
        """Send what the coordinator and its nodes do not have yet; the number of bytes sent."""
        missing: set[str] = set()
        for manifest in bundle.manifests:
            missing |= await self.locate(manifest)
        paths = {digest: path for digest, path in bundle.files.items() if digest in missing}
        sizes = {digest: path.stat().st_size for digest, path in paths.items()}
        total, sent = sum(sizes.values()), 0
        for digest, path in paths.items():
            await transfer.put_file(self._artifacts, path, check_digest(digest))
            sent += sizes[digest]
            progress(sent, total)
        return sent

    async def fetch(self, artifacts: list[dict[str, Any]], folder: Path) -> list[Path]:
        """Write a job's artifacts below a folder, each checked against its digest; their paths in the same order."""
        paths = []
        for artifact in artifacts:
            path = folder / check_path(artifact["name"])
            path.parent.mkdir(parents=True, exist_ok=True)
            await transfer.get_file(self._artifacts, check_digest(artifact["digest"]), path)
            paths.append(path)
        return paths

    # ---- calls

    async def _ask(
        self, method: Callable[..., Awaitable[Any]], request: object, deadline_s: float = limits.CALL_DEADLINE_S
    ) -> dict[str, Any]:
        with dial.errors_of(self._address):
            reply = await method(request, timeout=deadline_s)
        document: dict[str, Any] = json.loads(reply.json)
        return document

    async def _stream(
        self, method: Callable[..., AsyncIterator[Any]], request: object, convert: Callable[[Any], T]
    ) -> AsyncIterator[T]:
        with dial.errors_of(self._address):
            async for message in method(request, timeout=STREAM_DEADLINE_S):
                yield convert(message)


async def _patiently(ask: Callable[[], Awaitable[dict[str, Any]]], patience: Patience) -> dict[str, Any]:
    """An idempotent question, asked again while the coordinator is away."""
    since, tries = patience.clock(), 0
    while True:
        try:
            return await ask()
        except HiveError as error:
            if not TABLE[error.code].retryable or patience.clock() - since > patience.seconds:
                raise
            if tries == 1:
                patience.on_outage(error)
        await patience.pause(delay_s(tries, patience.rng))
        tries += 1


def _manifest(value: Manifest | None) -> bytes:
    return encode(value) if value is not None else b""


def _submission(bundle: Bundle, key: str) -> jobs_pb2.SubmitRequest:
    return jobs_pb2.SubmitRequest(
        spec_json=jobspec.dump(bundle.spec).encode(),
        code_json=_manifest(bundle.code),
        data_json=_manifest(bundle.data),
        test_json=_manifest(bundle.test),
        weights_json=_manifest(bundle.weights),
        idempotency_key=key,
    )


def _line(message: jobs_pb2.Document) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(message.json)
    return content


def _event(message: jobs_pb2.Event) -> EventRecord:
    payload = json.loads(message.payload_json) if message.payload_json else {}
    return EventRecord(
        message.seq, message.time_unix_s, message.kind, message.job_id, message.node_id, dict(payload or {})
    )


def _log_text(message: jobs_pb2.LogChunk) -> LogText:
    return LogText(message.text.decode(errors="replace"), message.end_bytes, message.finished, message.state)
