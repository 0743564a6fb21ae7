"""What each write means, the same for every engine: pure decisions over single rows.

`apply` reads and writes rows through `Rows` inside the engine's transaction and raises before or between row writes;
the engine then undoes what was written. Owns compare-and-swap, the state tables, fences, tokens, spools and event
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, assert_never

from coordinator.records import Attempt, Event, Job, Member, TokenRecord
from coordinator.store.chain import Head, chained
from coordinator.store.protocol import (
    Accept,
    AppendEvent,
    Duplicate,
    PutAttempt,
    PutJob,
    PutMember,
    PutToken,
    SetMeta,
    UseToken,
    Write,
)
from protos import documents
from protos.errors import AccessError, Conflict, ErrorCode, NotFound
from protos.ids import Fence, JobId, NodeId
from protos.states import ATTEMPT_TRANSITIONS, JOB_TRANSITIONS, NODE_TRANSITIONS

_ANOTHER_TOKEN = "ask for a new token: hive token create"


class Rows(Protocol):
    """Row access inside one transaction. A put inserts or replaces by primary key."""

    def job(self, job_id: JobId) -> Job | None: ...
    def job_by_idempotency_key(self, key: str) -> Job | None: ...
    def put_job(self, job: Job) -> None: ...
    def attempt(self, job_id: JobId, fence: Fence, rank: int) -> Attempt | None: ...
    def put_attempt(self, attempt: Attempt) -> None: ...
    def member(self, node_id: NodeId) -> Member | None: ...
    def put_member(self, member: Member) -> None: ...
    def token(self, token_id: str) -> TokenRecord | None: ...
    def token_by_hash(self, secret_hash: str) -> TokenRecord | None: ...
    def put_token(self, token: TokenRecord) -> None: ...
    def token_used(self, token_id: str, key_id: str) -> bool: ...
    def add_token_use(self, token_id: str, key_id: str, used_s: float) -> None: ...
    def accepted(self, node_id: NodeId, spool_id: str) -> int: ...
    def put_accepted(self, node_id: NodeId, spool_id: str, seq: int) -> None: ...
    def put_meta(self, key: str, value: str) -> None: ...
    def add_event(self, event: Event) -> None: ...


@dataclass(slots=True)
class Log:
    """The end of the event log while a commit is applied."""

    head: Head
    appended: list[Event] = field(default_factory=list)


def apply(rows: Rows, head: Head, writes: Sequence[Write], clock: Callable[[], float]) -> Log:
    """Perform the writes in order; the log as it ends. Raises Conflict, NotFound or AccessError."""
    log = Log(head)
    for write in writes:
        match write:
            case PutJob(job, expect_version):
                rows.put_job(_next_job(rows, job, expect_version))
            case PutAttempt(attempt, expect_version):
                rows.put_attempt(_next_attempt(rows, attempt, expect_version))
            case PutMember(member, expect_version):
                rows.put_member(_next_member(rows, member, expect_version))
            case PutToken(token):
                rows.put_token(_new_token(rows, token))
            case UseToken():
                _use_token(rows, write)
            case AppendEvent():
                _append(rows, log, write, clock())
            case Accept(node_id, spool_id, seq):
                _accept(rows, node_id, spool_id, seq)
            case SetMeta(key, value):
                rows.put_meta(key, value)
            case _:
                assert_never(write)
    return log


def _next_job(rows: Rows, job: Job, expect_version: int | None) -> Job:
    stored = rows.job(job.job_id)
    what = f"job {job.job_id}"
    version = _swap(what, None if stored is None else stored.version, expect_version)
    if stored is not None:
        if job.state is not stored.state and job.state not in JOB_TRANSITIONS[stored.state]:
            raise _illegal(what, stored.state, job.state)
        if job.fence < stored.fence:
            raise Conflict(
                f"{what} is at fence {stored.fence}, a write for fence {job.fence} came too late",
                "a newer generation has started; read the job again",
                code=ErrorCode.STALE_FENCE,
            )
        if job.idempotency_key != stored.idempotency_key:
            raise Conflict(f"the idempotency key of {what} cannot change", "keep the key the job was submitted with")
    if job.idempotency_key is not None:
        owner = rows.job_by_idempotency_key(job.idempotency_key)
        if owner is not None and owner.job_id != job.job_id:
            raise Conflict(
                f"the idempotency key of {what} already belongs to job {owner.job_id}",
                "the same submission was received before; use that job",
            )
    return replace(job, version=version)


def _next_attempt(rows: Rows, attempt: Attempt, expect_version: int | None) -> Attempt:
    what = f"attempt {attempt.job_id}/{attempt.fence}/{attempt.rank}"
    if rows.job(attempt.job_id) is None:
        raise NotFound(f"{what}: there is no such job", "write the job first")
    stored = rows.attempt(attempt.job_id, attempt.fence, attempt.rank)
    version = _swap(what, None if stored is None else stored.version, expect_version)
    if (
        stored is not None
        and attempt.state is not stored.state
        and attempt.state not in ATTEMPT_TRANSITIONS[stored.state]
    ):
        raise _illegal(what, stored.state, attempt.state)
    return replace(attempt, version=version)


def _next_member(rows: Rows, member: Member, expect_version: int | None) -> Member:
    stored = rows.member(member.node_id)
    what = f"node {member.node_id}"
    version = _swap(what, None if stored is None else stored.version, expect_version)
    if stored is not None and member.link is not stored.link and member.link not in NODE_TRANSITIONS[stored.link]:
        raise _illegal(what, stored.link, member.link)
    return replace(member, version=version)


def _swap(what: str, stored: int | None, expected: int | None) -> int:
    """The version of the row after this write; versions start at 1."""
    if stored == expected:
        return (stored or 0) + 1
    if stored is None:
        raise Conflict(f"{what} is not there, version {expected} of it was expected", "read it again")
    if expected is None:
        raise Conflict(f"{what} is already there at version {stored}", "read it and send the version that was read")
    raise Conflict(f"{what} is at version {stored}, not {expected}: another write came first", "read it again")


def _illegal(what: str, before: str, after: str) -> Conflict:
    return Conflict(f"{what} is {before} and cannot become {after}", "read it again: its state has moved on")


def _new_token(rows: Rows, token: TokenRecord) -> TokenRecord:
    owner = rows.token_by_hash(token.secret_hash)
    if owner is not None and owner.token_id != token.token_id:
        raise Conflict(f"token {owner.token_id} has the same secret", "create a token with a new secret")
    return token


def unknown_token() -> AccessError:
    return AccessError("this token is not known to this coordinator", "check that it is whole, or " + _ANOTHER_TOKEN)


def _use_token(rows: Rows, use: UseToken) -> None:
    token = rows.token_by_hash(use.secret_hash)
    if token is None:
        raise unknown_token()
    if token.revoked:
        raise AccessError(f"token {token.token_id} has been revoked", _ANOTHER_TOKEN)
    if rows.token_used(token.token_id, use.key_id):
        return
    if use.now >= token.expires_s:
        raise AccessError(f"token {token.token_id} expired {_ago(use.now - token.expires_s)} ago", _ANOTHER_TOKEN)
    if token.uses_left is not None:
        if token.uses_left <= 0:
            raise AccessError(f"token {token.token_id} has been used up", _ANOTHER_TOKEN)
        rows.put_token(replace(token, uses_left=token.uses_left - 1))
    rows.add_token_use(token.token_id, use.key_id, use.now)


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} seconds"


def _accept(rows: Rows, node_id: NodeId, spool_id: str, seq: int) -> None:
    stored = rows.accepted(node_id, spool_id)
    if seq <= stored:
        raise Duplicate(f"message {seq} of {node_id}/{spool_id} is already durable", "acknowledge it again")
    rows.put_accepted(node_id, spool_id, seq)


def _append(rows: Rows, log: Log, write: AppendEvent, now: float) -> None:
    payload = documents.encode(dict(write.payload))
    event, log.head = chained(log.head, Event(0, float(now), write.kind, write.job_id, write.node_id, payload, ""))
    rows.add_event(event)
    log.appended.append(event)
