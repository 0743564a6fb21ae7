"""The durable store: SQLite in the coordinator's home, or the database of HIVE_DATABASE_URL.

Owns the life cycle: lock of the home, migration, writer thread, read threads. What a write means is in rules.py, SQL
is in rows.py, what differs between engines in engine.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa

from coordinator.records import Attempt, Job, Member, TokenRecord
from coordinator.store import migrations, rows
from coordinator.store.chain import Head, verify
from coordinator.store.engine import READERS, Engines, as_hive_error, open_engines
from coordinator.store.feed import Feed
from coordinator.store.home_lock import HomeLock
from coordinator.store.protocol import ChainCheck, Write
from coordinator.store.writer import Events, Writer
from protos.errors import Conflict
from protos.ids import Fence, JobId, NodeId
from protos.reserve import Reserve
from protos.states import JobState

P = ParamSpec("P")
T = TypeVar("T")

DATABASE = "hive.sqlite3"
RESERVE = "reserve"


class SqliteStore:
    """See coordinator.store.protocol.Store. Made by `open`; a commit cancelled while it waits may still happen."""

    def __init__(self, engines: Engines, lock: HomeLock, reserve: Reserve, clock: Callable[[], float], where: str):
        self._engines = engines
        self._lock = lock
        self._where = where
        with engines.read.connect() as connection:
            head = rows.select_head(connection)
        self._feed = Feed(head.seq)
        self._writer = Writer(engines.write, head, reserve, clock, where)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        self._closed = False
        self._writer.start()

    @classmethod
    async def open(cls, folder: Path, url: str | None = None, clock: Callable[[], float] = time.time) -> SqliteStore:
        """Lock the folder (HIVE_HOME/coordinator), create or migrate the database.

        Raises Conflict when another coordinator runs there or the database is of a newer hive, Exhausted when the disk
        is full, Unreachable when the database cannot be opened.
        """
        return await asyncio.to_thread(cls._open, folder, url, clock)

    @classmethod
    def _open(cls, folder: Path, url: str | None, clock: Callable[[], float]) -> SqliteStore:
        lock = HomeLock(folder)
        path = folder / DATABASE
        where = str(path) if url is None else sa.engine.make_url(url).render_as_string(hide_password=True)
        engines: Engines | None = None
        try:
            engines = open_engines(path, url)
            migrations.upgrade(engines.write, where)
            reserve = Reserve(folder / RESERVE)
            reserve.take()
            return cls(engines, lock, reserve, clock, where)
        except BaseException as error:
            if engines is not None:
                engines.dispose()
            lock.release()
            raise as_hive_error(error, where) from None

    async def commit(self, *writes: Write) -> Events:
        self._check_open()
        loop = asyncio.get_running_loop()
        durable = self._writer.submit(writes)

        def announce(finished: Future[Events]) -> None:
            if not finished.cancelled() and finished.exception() is None and (events := finished.result()):
                with contextlib.suppress(RuntimeError):  # the loop is gone: nobody follows any more
                    loop.call_soon_threadsafe(self._feed.advance, events[-1].seq)

        durable.add_done_callback(announce)  # also when whoever waits here has been cancelled
        return await asyncio.wrap_future(durable)

    def _check_open(self) -> None:
        if self._closed:
            raise Conflict(f"the store {self._where} is closed", "the coordinator is shutting down; try again later")

    async def _read(
        self, select: Callable[Concatenate[sa.Connection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        self._check_open()

        def run() -> T:
            try:
                with self._engines.read.connect() as connection:
                    return select(connection, *args, **kwargs)
            except Exception as error:
                raise as_hive_error(error, self._where) from error

        return await asyncio.get_running_loop().run_in_executor(self._readers, run)

    async def job(self, job_id: JobId) -> Job | None:
        return await self._read(rows.select_job, job_id)

    async def jobs(self, states: Collection[JobState] | None = None, limit: int = 1000) -> tuple[Job, ...]:
        return await self._read(rows.select_jobs, states, limit)

    async def job_by_idempotency_key(self, key: str) -> Job | None:
        return await self._read(rows.select_job_by_idempotency_key, key)

    async def attempts(self, job_id: JobId, fence: Fence | None = None) -> tuple[Attempt, ...]:
        return await self._read(rows.select_attempts, job_id, fence)

    async def member(self, node_id: NodeId) -> Member | None:
        return await self._read(rows.select_member, node_id)

    async def members(self) -> tuple[Member, ...]:
        return await self._read(rows.select_members)

    async def tokens(self) -> tuple[TokenRecord, ...]:
        return await self._read(rows.select_tokens)

    async def token_by_hash(self, secret_hash: str) -> TokenRecord | None:
        return await self._read(rows.select_token_by_hash, secret_hash)

    async def events(
        self,
        after_seq: int = 0,
        job_id: JobId | None = None,
        kinds: Collection[str] | None = None,
        limit: int = 1000,
    ) -> Events:
        return await self._read(rows.select_events, after_seq, job_id, kinds, limit)

    async def events_after(
        self,
        after_seq: int,
        timeout_s: float,
        job_id: JobId | None = None,
        kinds: Collection[str] | None = None,
        limit: int = 1000,
    ) -> Events:
        return await self._feed.follow(after_seq, timeout_s, lambda seq: self.events(seq, job_id, kinds, limit))

    @property
    def last_seq(self) -> int:
        return self._feed.last_seq

    async def accepted(self, node_id: NodeId, spool_id: str) -> int:
        return await self._read(rows.select_accepted, node_id, spool_id)

    async def meta(self, key: str) -> str | None:
        return await self._read(rows.select_meta, key)

    async def verify_chain(self) -> ChainCheck:
        def check(connection: sa.Connection) -> ChainCheck:
            head: Head = rows.select_head(connection)  # in the same snapshot as the events
            return verify(rows.every_event(connection), head)

        return await self._read(check)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.stop()
        self._readers.shutdown()
        self._engines.dispose()
        self._lock.release()
