"""Waking whoever follows the event log, without polling. Lives on one event loop; `advance` is called there only."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from coordinator.records import Event

Read = Callable[[int], Awaitable[tuple[Event, ...]]]


class Feed:
    def __init__(self, last_seq: int) -> None:
        self.last_seq = last_seq
        self._changed = asyncio.Event()

    def advance(self, last_seq: int) -> None:
        """Events up to `last_seq` are durable and visible to reads."""
        if last_seq > self.last_seq:
            self.last_seq = last_seq
            self._changed.set()
            self._changed = asyncio.Event()

    async def follow(self, after_seq: int, timeout_s: float, read: Read) -> tuple[Event, ...]:
        """What `read(after_seq)` gives as soon as it gives anything; empty after the time-out.

        Never reads the same stretch of the log twice: what did not match once cannot match later.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    changed, seen = self._changed, self.last_seq
                    if seen > after_seq and (found := await read(after_seq)):
                        return found
                    after_seq = max(after_seq, seen)
                    await changed.wait()
        except TimeoutError:
            return ()
