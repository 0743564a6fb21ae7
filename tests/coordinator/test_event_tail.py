"""Many followers of one log: each gets all of its events, and the log is read once for all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from coordinator.event_tail import EventTail
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import AppendEvent
from protos.ids import JobId

A, B = JobId("j-a"), JobId("j-b")


class CountingStore(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.broken = 0

    async def events(self, *arguments: Any, **options: Any) -> Any:
        self.reads += 1
        return await super().events(*arguments, **options)

    async def events_after(self, *arguments: Any, **options: Any) -> Any:
        if self.broken:
            self.broken -= 1
            raise OSError("the disk did not answer")
        return await super().events_after(*arguments, **options)

    async def happen(self, job_id: JobId, count: int = 1) -> None:
        for _ in range(count):
            await self.commit(AppendEvent("progress", job_id))


def run(body: Callable[[CountingStore, EventTail], Awaitable[None]], kept: int = 100, before: int = 0) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            store = CountingStore()
            await store.happen(A, before)
            tail = EventTail(store, kept)
            running = asyncio.create_task(tail.run())
            try:
                await body(store, tail)
            finally:
                running.cancel()

    asyncio.run(main())


async def follow(tail: EventTail, job_id: JobId | None, seen: list[int], until: int, after: int = 0) -> None:
    while not seen or seen[-1] < until:
        page = await tail.after(seen[-1] if seen else after, 10.0, job_id, 7)
        seen += [event.seq for event in page]


def test_every_follower_gets_its_own_events_once_and_in_order() -> None:
    async def body(store: CountingStore, tail: EventTail) -> None:
        seen: list[list[int]] = [[], [], []]
        following = [
            asyncio.create_task(follow(tail, job_id, found, until))
            for job_id, found, until in zip((None, A, B), seen, (60, 59, 60), strict=True)
        ]
        for _ in range(30):
            await store.happen(A)
            await store.happen(B)
            await asyncio.sleep(0)
        await asyncio.gather(*following)
        assert seen == [list(range(1, 61)), list(range(1, 61, 2)), list(range(2, 61, 2))]

    run(body)


def test_a_hundred_followers_cost_one_read_of_the_log() -> None:
    async def body(store: CountingStore, tail: EventTail) -> None:
        seen: list[list[int]] = [[] for _ in range(100)]
        following = [asyncio.create_task(follow(tail, A, found, 50)) for found in seen]
        await asyncio.sleep(0)
        for _ in range(50):
            await store.happen(A)
            await asyncio.sleep(0)
        await asyncio.gather(*following)
        assert all(found == list(range(1, 51)) for found in seen) and store.reads <= 60

    run(body)


def test_one_that_is_far_behind_reads_the_log_and_catches_up(tmp_path: Any) -> None:
    async def body(store: CountingStore, tail: EventTail) -> None:
        seen: list[int] = []
        catching_up = asyncio.create_task(follow(tail, None, seen, 400))
        await store.happen(A, 100)
        late: list[int] = []
        await catching_up
        await follow(tail, None, late, 400, after=5)
        assert seen == list(range(1, 401)) and late == list(range(6, 401))

    run(body, kept=20, before=300)


def test_nothing_new_is_an_empty_page_after_the_time() -> None:
    async def body(store: CountingStore, tail: EventTail) -> None:
        await store.happen(B)
        assert await tail.after(0, 0.05, A, 10) == ()
        assert [event.seq for event in await tail.after(0, 10.0, B, 10)] == [1]

    run(body)


def test_a_log_that_could_not_be_read_is_read_again() -> None:
    async def body(store: CountingStore, tail: EventTail) -> None:
        store.broken = 1
        waiting = asyncio.create_task(tail.after(0, 10.0, A, 10))
        await store.happen(A)
        assert [event.seq for event in await waiting] == [1]

    run(body)
