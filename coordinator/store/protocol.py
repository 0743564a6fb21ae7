"""What a store promises, whatever engine it runs on.

`commit` is the only way to write: all of its writes happen or none does, and it returns only when they are durable.
Compare-and-swap, state tables and token rules are in rules.py and are the same for every engine. Events get their `seq`
and become visible in that order, without gaps, so a reader that resumes after the last seq it saw misses nothing.

A read that finds nothing answers None: at this level an absent row is an answer, the caller knows what it means.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from coordinator.records import Attempt, Event, Job, Member, TokenRecord
from protos.errors import Conflict
from protos.ids import Fence, JobId, NodeId
from protos.states import JobState


class Duplicate(Conflict):
    """This spool message is already durable: nothing was written, and it can be acknowledged again."""


@dataclass(frozen=True, slots=True)
class PutJob:
    """Write a job. `expect_version` is the version that was read, None for a job that must not exist yet.

    Raises Conflict when another write came first, when the states table has no such transition, when the fence would
    fall (code STALE_FENCE), or when the idempotency key belongs to another job.
    """

    job: Job
    expect_version: int | None = None


@dataclass(frozen=True, slots=True)
class PutAttempt:
    """Write one rank of a generation, under the same rules as PutJob. Its job must exist."""

    attempt: Attempt
    expect_version: int | None = None


@dataclass(frozen=True, slots=True)
class PutMember:
    """Write a member, under the same rules as PutJob."""

    member: Member
    expect_version: int | None = None


@dataclass(frozen=True, slots=True)
class PutToken:
    """Write a token, new or changed."""

    token: TokenRecord


@dataclass(frozen=True, slots=True)
class UseToken:
    """Take one use of a token for a key. Raises AccessError: unknown, revoked, expired or used up.

    The same (token, key) again is the same use and takes nothing, so a lost answer can be asked for again.
    """

    secret_hash: str
    now: float
    key_id: str


@dataclass(frozen=True, slots=True)
class AppendEvent:
    """Add to the event log. `payload` is stored as protos.documents.encode writes it (a non-finite float is null)."""

    kind: str
    job_id: JobId | None = None
    node_id: NodeId | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Accept:
    """Remember the highest number made durable of a node's spool. Raises Duplicate when `seq` is not above it."""

    node_id: NodeId
    spool_id: str
    seq: int


@dataclass(frozen=True, slots=True)
class SetMeta:
    key: str
    value: str


Write: TypeAlias = PutJob | PutAttempt | PutMember | PutToken | UseToken | AppendEvent | Accept | SetMeta


@dataclass(frozen=True, slots=True)
class ChainCheck:
    """Whether the event log is what was written. `broken_at` is the first seq that does not fit, None when all do."""

    events: int
    broken_at: int | None
    message: str


class Store(Protocol):
    async def commit(self, *writes: Write) -> tuple[Event, ...]:
        """Perform all writes in order, or none; returns the events appended, durable. Raises Conflict, AccessError
        or NotFound by the rules of the writes, and Exhausted when the disk is full."""

    async def job(self, job_id: JobId) -> Job | None: ...

    async def jobs(self, states: Collection[JobState] | None = None, limit: int = 1000) -> tuple[Job, ...]:
        """Newest first."""

    async def job_by_idempotency_key(self, key: str) -> Job | None: ...

    async def attempts(self, job_id: JobId, fence: Fence | None = None) -> tuple[Attempt, ...]:
        """By fence, then rank."""

    async def member(self, node_id: NodeId) -> Member | None: ...

    async def members(self) -> tuple[Member, ...]:
        """By node id, those that left too."""

    async def tokens(self) -> tuple[TokenRecord, ...]:
        """Newest first."""

    async def token_by_hash(self, secret_hash: str) -> TokenRecord | None: ...

    async def events(
        self,
        after_seq: int = 0,
        job_id: JobId | None = None,
        kinds: Collection[str] | None = None,
        limit: int = 1000,
    ) -> tuple[Event, ...]:
        """The first `limit` matching events with seq > after_seq, in order."""

    async def events_after(
        self,
        after_seq: int,
        timeout_s: float,
        job_id: JobId | None = None,
        kinds: Collection[str] | None = None,
        limit: int = 1000,
    ) -> tuple[Event, ...]:
        """Like `events`, but waits for the first match; empty when `timeout_s` passed without one."""

    @property
    def last_seq(self) -> int:
        """Of the newest durable event, 0 when there is none."""

    async def accepted(self, node_id: NodeId, spool_id: str) -> int:
        """The highest number made durable of a spool, 0 for an unknown one."""

    async def meta(self, key: str) -> str | None: ...

    async def verify_chain(self) -> ChainCheck:
        """Read the whole event log and check its hashes: slow, for doctor."""

    async def close(self) -> None:
        """Finish the commits under way and let go of the database."""
