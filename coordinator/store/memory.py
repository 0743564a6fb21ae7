"""The store without a disk: for the simulation and for tests of what stands on a store. Nothing survives it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable
from typing import TypeVar

from coordinator.records import Attempt, Event, Job, Member, TokenRecord
from coordinator.store.chain import Head, verify
from coordinator.store.feed import Feed
from coordinator.store.protocol import ChainCheck, Write
from coordinator.store.rules import apply
from protos.ids import Fence, JobId, NodeId
from protos.states import JobState

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class MemoryRows:
    """Dictionaries with an undo list: what a failed commit wrote is taken back in reverse."""

    def __init__(self) -> None:
        self.jobs: dict[JobId, Job] = {}
        self.keys: dict[str, JobId] = {}
        self.attempts: dict[tuple[JobId, Fence, int], Attempt] = {}
        self.members: dict[NodeId, Member] = {}
        self.tokens: dict[str, TokenRecord] = {}
        self.token_uses: dict[tuple[str, str], float] = {}
        self.spools: dict[tuple[NodeId, str], int] = {}
        self.meta: dict[str, str] = {}
        self.events: list[Event] = []
        self._undo: list[Callable[[], object]] = []

    def forget_undo(self) -> None:
        self._undo.clear()

    def roll_back(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _put(self, table: dict[K, V], key: K, value: V) -> None:
        if key in table:
            before = table[key]
            self._undo.append(lambda: table.__setitem__(key, before))
        else:
            self._undo.append(lambda: table.pop(key))
        table[key] = value

    def job(self, job_id: JobId) -> Job | None:
        return self.jobs.get(job_id)

    def job_by_idempotency_key(self, key: str) -> Job | None:
        job_id = self.keys.get(key)
        return None if job_id is None else self.jobs[job_id]

    def put_job(self, job: Job) -> None:
        self._put(self.jobs, job.job_id, job)
        if job.idempotency_key is not None:
            self._put(self.keys, job.idempotency_key, job.job_id)

    def attempt(self, job_id: JobId, fence: Fence, rank: int) -> Attempt | None:
        return self.attempts.get((job_id, fence, rank))

    def put_attempt(self, attempt: Attempt) -> None:
        self._put(self.attempts, (attempt.job_id, attempt.fence, attempt.rank), attempt)

    def member(self, node_id: NodeId) -> Member | None:
        return self.members.get(node_id)

    def put_member(self, member: Member) -> None:
        self._put(self.members, member.node_id, member)

    def token(self, token_id: str) -> TokenRecord | None:
        return self.tokens.get(token_id)

    def token_by_hash(self, secret_hash: str) -> TokenRecord | None:
        return next((token for token in self.tokens.values() if token.secret_hash == secret_hash), None)

    def put_token(self, token: TokenRecord) -> None:
        self._put(self.tokens, token.token_id, token)

    def token_used(self, token_id: str, key_id: str) -> bool:
        return (token_id, key_id) in self.token_uses

    def add_token_use(self, token_id: str, key_id: str, used_s: float) -> None:
        self._put(self.token_uses, (token_id, key_id), used_s)

    def accepted(self, node_id: NodeId, spool_id: str) -> int:
        return self.spools.get((node_id, spool_id), 0)

    def put_accepted(self, node_id: NodeId, spool_id: str, seq: int) -> None:
        self._put(self.spools, (node_id, spool_id), seq)

    def put_meta(self, key: str, value: str) -> None:
        self._put(self.meta, key, value)

    def add_event(self, event: Event) -> None:
        self.events.append(event)
        self._undo.append(self.events.pop)


class MemoryStore:
    """See coordinator.store.protocol.Store. A commit never yields to another task, so it is atomic as it stands."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._rows = MemoryRows()
        self._head = Head()
        self._feed = Feed(0)

    async def commit(self, *writes: Write) -> tuple[Event, ...]:
        try:
            log = apply(self._rows, self._head, writes, self._clock)
        except BaseException:
            self._rows.roll_back()
            raise
        self._rows.forget_undo()
        self._head = log.head
        self._feed.advance(log.head.seq)
        return tuple(log.appended)

    async def job(self, job_id: JobId) -> Job | None:
        return self._rows.job(job_id)

    async def jobs(self, states: Collection[JobState] | None = None, limit: int = 1000) -> tuple[Job, ...]:
        matching = [job for job in self._rows.jobs.values() if states is None or job.state in states]
        return tuple(sorted(matching, key=lambda job: (job.created_s, job.job_id), reverse=True)[:limit])

    async def job_by_idempotency_key(self, key: str) -> Job | None:
        return self._rows.job_by_idempotency_key(key)

    async def attempts(self, job_id: JobId, fence: Fence | None = None) -> tuple[Attempt, ...]:
        matching = [
            attempt
            for attempt in self._rows.attempts.values()
            if attempt.job_id == job_id and (fence is None or attempt.fence == fence)
        ]
        return tuple(sorted(matching, key=lambda attempt: (attempt.fence, attempt.rank)))

    async def member(self, node_id: NodeId) -> Member | None:
        return self._rows.member(node_id)

    async def members(self) -> tuple[Member, ...]:
        return tuple(sorted(self._rows.members.values(), key=lambda member: member.node_id))

    async def tokens(self) -> tuple[TokenRecord, ...]:
        newest = sorted(self._rows.tokens.values(), key=lambda token: (token.created_s, token.token_id), reverse=True)
        return tuple(newest)

    async def token_by_hash(self, secret_hash: str) -> TokenRecord | None:
        return self._rows.token_by_hash(secret_hash)

    async def events(
        self,
        after_seq: int = 0,
        job_id: JobId | None = None,
        kinds: Collection[str] | None = None,
        limit: int = 1000,
    ) -> tuple[Event, ...]:
        found: list[Event] = []
        for event in self._rows.events[max(0, after_seq) :]:  # event n lies at n - 1
            if len(found) >= limit:
                break
            if (job_id is None or event.job_id == job_id) and (kinds is None or event.kind in kinds):
                found.append(event)
        return tuple(found)

    async def events_after(
        self,
        after_seq: int,
        timeout_s: float,
        job_id: JobId | None = None,
        kinds: Collection[str] | None = None,
        limit: int = 1000,
    ) -> tuple[Event, ...]:
        return await self._feed.follow(after_seq, timeout_s, lambda seq: self.events(seq, job_id, kinds, limit))

    @property
    def last_seq(self) -> int:
        return self._feed.last_seq

    async def accepted(self, node_id: NodeId, spool_id: str) -> int:
        return self._rows.accepted(node_id, spool_id)

    async def meta(self, key: str) -> str | None:
        return self._rows.meta.get(key)

    async def verify_chain(self) -> ChainCheck:
        return verify(self._rows.events, self._head)

    async def close(self) -> None:
        return None
