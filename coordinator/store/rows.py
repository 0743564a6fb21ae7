"""The one file that talks SQL: single rows inside a transaction (`SqlRows`) and the reads (`select_*`).

Plain SQLAlchemy Core that SQLite and PostgreSQL both understand; columns and record fields have the same names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields
from typing import Any, TypeVar

import sqlalchemy as sa

from coordinator.records import Attempt, Event, Job, Member, TokenRecord
from coordinator.store import schema
from coordinator.store.chain import GENESIS, Head
from protos.ids import Fence, JobId, NodeId
from protos.states import JobState

R = TypeVar("R", Job, Attempt, Member, TokenRecord, Event)

HEAD_SEQ = "event_head_seq"
HEAD_CHAIN = "event_head_chain"


# Built once: making a statement costs more than running it.
_TABLES = schema.metadata.sorted_tables
_INSERT = {table.name: sa.insert(table) for table in _TABLES}
_UPDATE = {
    table.name: sa.update(table).where(*(column == sa.bindparam("key_" + column.name) for column in table.primary_key))
    for table in _TABLES
}
_JOB = sa.select(schema.jobs).where(schema.jobs.c.job_id == sa.bindparam("job_id"))
_ACCEPTED = sa.select(schema.spools.c.accepted).where(
    schema.spools.c.node_id == sa.bindparam("node_id"), schema.spools.c.spool_id == sa.bindparam("spool_id")
)


def _columns(record: Job | Attempt | Member | TokenRecord | Event) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _one(connection: sa.Connection, kind: type[R], query: sa.Select[Any], **parameters: Any) -> R | None:
    row = connection.execute(query, parameters).one_or_none()
    return None if row is None else kind(**row._mapping)


def _all(connection: sa.Connection, kind: type[R], query: sa.Select[Any]) -> tuple[R, ...]:
    return tuple(kind(**row._mapping) for row in connection.execute(query))


class SqlRows:
    """coordinator.store.rules.Rows over a connection with an open transaction."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def _put(self, table: sa.Table, values: dict[str, Any]) -> None:
        """Update by primary key, insert when there was nothing to update."""
        keys = {column.name for column in table.primary_key}
        parameters = {"key_" + name if name in keys else name: value for name, value in values.items()}
        if self._connection.execute(_UPDATE[table.name], parameters).rowcount == 0:
            self._connection.execute(_INSERT[table.name], values)

    def job(self, job_id: JobId) -> Job | None:
        return select_job(self._connection, job_id)

    def job_by_idempotency_key(self, key: str) -> Job | None:
        return select_job_by_idempotency_key(self._connection, key)

    def put_job(self, job: Job) -> None:
        self._put(schema.jobs, _columns(job))

    def attempt(self, job_id: JobId, fence: Fence, rank: int) -> Attempt | None:
        t = schema.attempts
        query = sa.select(t).where(t.c.job_id == job_id, t.c.fence == fence, t.c.rank == rank)
        return _one(self._connection, Attempt, query)

    def put_attempt(self, attempt: Attempt) -> None:
        self._put(schema.attempts, _columns(attempt))

    def member(self, node_id: NodeId) -> Member | None:
        return select_member(self._connection, node_id)

    def put_member(self, member: Member) -> None:
        self._put(schema.members, _columns(member))

    def token(self, token_id: str) -> TokenRecord | None:
        t = schema.tokens
        return _one(self._connection, TokenRecord, sa.select(t).where(t.c.token_id == token_id))

    def token_by_hash(self, secret_hash: str) -> TokenRecord | None:
        return select_token_by_hash(self._connection, secret_hash)

    def put_token(self, token: TokenRecord) -> None:
        self._put(schema.tokens, _columns(token))

    def token_used(self, token_id: str, key_id: str) -> bool:
        t = schema.token_uses
        query = sa.select(t.c.used_s).where(t.c.token_id == token_id, t.c.key_id == key_id)
        return self._connection.execute(query).one_or_none() is not None

    def add_token_use(self, token_id: str, key_id: str, used_s: float) -> None:
        values = {"token_id": token_id, "key_id": key_id, "used_s": used_s}
        self._connection.execute(_INSERT["token_uses"], values)

    def accepted(self, node_id: NodeId, spool_id: str) -> int:
        return select_accepted(self._connection, node_id, spool_id)

    def put_accepted(self, node_id: NodeId, spool_id: str, seq: int) -> None:
        self._put(schema.spools, {"node_id": node_id, "spool_id": spool_id, "accepted": seq})

    def put_meta(self, key: str, value: str) -> None:
        self._put(schema.meta, {"key": key, "value": value})

    def add_event(self, event: Event) -> None:
        self._connection.execute(_INSERT["events"], _columns(event))

    def put_head(self, head: Head) -> None:
        """Kept beside the log so that rows cut off its end are missed."""
        self.put_meta(HEAD_SEQ, str(head.seq))
        self.put_meta(HEAD_CHAIN, head.chain)


def select_job(connection: sa.Connection, job_id: JobId) -> Job | None:
    return _one(connection, Job, _JOB, job_id=job_id)


def select_job_by_idempotency_key(connection: sa.Connection, key: str) -> Job | None:
    return _one(connection, Job, sa.select(schema.jobs).where(schema.jobs.c.idempotency_key == key))


def select_jobs(connection: sa.Connection, states: Collection[JobState] | None, limit: int) -> tuple[Job, ...]:
    t = schema.jobs
    query = sa.select(t).order_by(t.c.created_s.desc(), t.c.job_id.desc()).limit(limit)
    if states is not None:
        query = query.where(t.c.state.in_(sorted(states)))
    return _all(connection, Job, query)


def select_attempts(connection: sa.Connection, job_id: JobId, fence: Fence | None) -> tuple[Attempt, ...]:
    t = schema.attempts
    query = sa.select(t).where(t.c.job_id == job_id).order_by(t.c.fence, t.c.rank)
    if fence is not None:
        query = query.where(t.c.fence == fence)
    return _all(connection, Attempt, query)


def select_member(connection: sa.Connection, node_id: NodeId) -> Member | None:
    return _one(connection, Member, sa.select(schema.members).where(schema.members.c.node_id == node_id))


def select_members(connection: sa.Connection) -> tuple[Member, ...]:
    return _all(connection, Member, sa.select(schema.members).order_by(schema.members.c.node_id))


def select_tokens(connection: sa.Connection) -> tuple[TokenRecord, ...]:
    t = schema.tokens
    return _all(connection, TokenRecord, sa.select(t).order_by(t.c.created_s.desc(), t.c.token_id.desc()))


def select_token_by_hash(connection: sa.Connection, secret_hash: str) -> TokenRecord | None:
    t = schema.tokens
    return _one(connection, TokenRecord, sa.select(t).where(t.c.secret_hash == secret_hash))


def select_events(
    connection: sa.Connection,
    after_seq: int,
    job_id: JobId | None,
    kinds: Collection[str] | None,
    limit: int,
) -> tuple[Event, ...]:
    t = schema.events
    query = sa.select(t).where(t.c.seq > after_seq).order_by(t.c.seq).limit(limit)
    if job_id is not None:
        query = query.where(t.c.job_id == job_id)
    if kinds is not None:
        query = query.where(t.c.kind.in_(sorted(kinds)))
    return _all(connection, Event, query)


def every_event(connection: sa.Connection) -> Iterator[Event]:
    """The whole log in order, a thousand at a time."""
    after_seq = 0
    while batch := select_events(connection, after_seq, None, None, 1000):
        yield from batch
        after_seq = batch[-1].seq


def select_accepted(connection: sa.Connection, node_id: NodeId, spool_id: str) -> int:
    return connection.execute(_ACCEPTED, {"node_id": node_id, "spool_id": spool_id}).scalar_one_or_none() or 0


def select_meta(connection: sa.Connection, key: str) -> str | None:
    query = sa.select(schema.meta.c.value).where(schema.meta.c.key == key)
    return connection.execute(query).scalar_one_or_none()


def select_head(connection: sa.Connection) -> Head:
    """The recorded end of the event log."""
    return Head(int(select_meta(connection, HEAD_SEQ) or 0), select_meta(connection, HEAD_CHAIN) or GENESIS)
