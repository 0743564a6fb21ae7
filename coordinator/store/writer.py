"""The one thread that writes, with group commit.

Commits that wait at the same moment share one transaction and so one flush of the disk. Each has its own savepoint:
one that breaks a rule is rolled back alone. Nobody is answered before COMMIT has returned. When the transaction itself
fails (full disk, input/output error) none of its commits happened and each is told so.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import sqlalchemy as sa

from coordinator.records import Event
from coordinator.store.chain import Head
from coordinator.store.engine import as_hive_error, disk_is_full
from coordinator.store.protocol import Write
from coordinator.store.rows import SqlRows
from coordinator.store.rules import apply
from protos.reserve import Reserve

MAX_GROUP = 512
_RESERVE_RETRY_S = 60.0

Events = tuple[Event, ...]


@dataclass(slots=True)
class _Request:
    writes: Sequence[Write]
    done: Future[Events] = field(default_factory=Future)


class Writer:
    """`head` is what the database holds; read by others only before `start` and after `stop`."""

    def __init__(self, engine: sa.Engine, head: Head, reserve: Reserve, clock: Callable[[], float], where: str) -> None:
        self.head = head
        self._engine = engine
        self._reserve = reserve
        self._clock = clock
        self._where = where
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._next_reserve_s = 0.0
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, writes: Sequence[Write]) -> Future[Events]:
        """Thread-safe. The future is resolved on the writer thread; cancelled in time, nothing is written."""
        request = _Request(writes)
        self._queue.put(request)
        return request.done

    def stop(self) -> None:
        """Finish what was submitted, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            first = self._queue.get()
            if first is None:
                return
            group, stopping = [first], False
            while len(group) < MAX_GROUP and not self._queue.empty():
                request = self._queue.get()
                if request is None:
                    stopping = True
                    break
                group.append(request)
            self._commit(group)
            if stopping:
                return
            self._keep_reserve()

    def _commit(self, waiting: list[_Request]) -> None:
        group = [request for request in waiting if request.done.set_running_or_notify_cancel()]
        results: list[Events | BaseException] = []
        try:
            with self._engine.begin() as connection:
                head = self.head
                for request in group:
                    head, result = self._perform(connection, head, request.writes)
                    results.append(result)
                if head != self.head:
                    SqlRows(connection).put_head(head)
            self.head = head
        except Exception as error:
            if disk_is_full(error):
                self._reserve.release()
            failure = as_hive_error(error, self._where)
            results = [failure for _ in group]
        for request, result in zip(group, results, strict=True):
            if isinstance(result, BaseException):
                request.done.set_exception(result)
            else:
                request.done.set_result(result)

    def _perform(
        self, connection: sa.Connection, head: Head, writes: Sequence[Write]
    ) -> tuple[Head, Events | BaseException]:
        savepoint = connection.begin_nested()
        try:
            log = apply(SqlRows(connection), head, writes, self._clock)
            savepoint.commit()
            return log.head, tuple(log.appended)
        except (sa.exc.OperationalError, OSError):
            raise  # the engine failed, not this commit: it may have ended the transaction, savepoints and all
        except Exception as error:
            savepoint.rollback()
            return head, as_hive_error(error, self._where)

    def _keep_reserve(self) -> None:
        now = time.monotonic()
        if now >= self._next_reserve_s:
            self._next_reserve_s = now + _RESERVE_RETRY_S
            self._reserve.take()
