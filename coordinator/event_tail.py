"""The newest events in memory, read from the store once for all who follow the log.

A follower costs a wait and a slice of a list, however many there are; only one that is far behind reads the store. It
is woken by events of its own job alone. Invariant: the kept events are the end of the log, without gaps.
"""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

from coordinator.records import Event
from coordinator.store.protocol import Store
from protos.ids import JobId
from protos.log import Log

log = Log("hive.coordinator.event_tail")

_KEPT = 4096
_PAGE = 500
_WAIT_S = 30.0
_TRY_AGAIN_S = 1.0


class _Signal(asyncio.Event):
    """Lives as long as somebody waits for it."""


class EventTail:
    """`run` must be running for `after` to return anything new."""

    def __init__(self, store: Store, kept: int = _KEPT) -> None:
        self._store = store
        self._kept = kept
        self._events: list[Event] = []
        self._last = store.last_seq
        self._signals: WeakValueDictionary[JobId | None, _Signal] = WeakValueDictionary()

    @property
    def _before(self) -> int:
        """The seq before the oldest event that is kept."""
        return self._last - len(self._events)

    async def run(self) -> None:
        while True:
            try:
                self._take(await self._store.events_after(self._last, _WAIT_S, limit=_PAGE))
            except Exception:
                log.exception("the event log cannot be read")
                await asyncio.sleep(_TRY_AGAIN_S)

    def _take(self, page: tuple[Event, ...]) -> None:
        if not page:
            return
        self._events += page
        self._last = page[-1].seq
        if len(self._events) > 2 * self._kept:
            del self._events[: -self._kept]
        for key in {None, *(event.job_id for event in page)}:
            signal = self._signals.pop(key, None)
            if signal is not None:
                signal.set()

    async def after(self, seq: int, timeout_s: float, job_id: JobId | None, limit: int) -> tuple[Event, ...]:
        """As Store.events_after: what follows `seq` as soon as there is any; empty when the time has passed."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    before = self._before
                    if seq < before:
                        if page := await self._store.events(seq, job_id, limit=limit):
                            return page
                        seq = before  # nothing of it is older than what was kept when we asked
                        continue
                    signal = self._signals.setdefault(job_id, _Signal())
                    news = self._events[seq - before :]
                    if found := [event for event in news if job_id is None or event.job_id == job_id]:
                        return tuple(found[:limit])
                    seq = max(seq, self._last)
                    await signal.wait()
        except TimeoutError:
            return ()
