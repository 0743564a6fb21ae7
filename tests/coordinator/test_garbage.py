"""Which blobs stay and which go, over the real store of blobs with a clock of our own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from coordinator.blobs import BlobStore
from coordinator.garbage import KEEP_REPLACED_S, KEEP_S, Garbage
from coordinator.records import Job
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import AppendEvent, PutJob
from protos import documents
from protos.artifact import FileEntry, Manifest
from protos.ids import Digest, JobId
from protos.states import JobState, Reason
from protos.work import Checkpoint

PATH_TO = {
    JobState.RUNNING: (JobState.PLANNING, JobState.QUEUED, JobState.STARTING, JobState.RUNNING),
    JobState.FAILED: (JobState.PLANNING, JobState.FAILED),
}


class House:
    def __init__(self, folder: Path) -> None:
        self.now = 1_000_000.0
        self.store, self.blobs = MemoryStore(), BlobStore(folder)
        self.garbage = Garbage(self.store, self.blobs, lambda: self.now)

    async def blob(self, content: bytes) -> Manifest:
        """A file that came now."""
        digest = await self.blobs.put_bytes(content)
        os.utime(self.blobs.path(digest), (self.now, self.now))
        return Manifest((FileEntry("file", digest, len(content)),))

    async def job(self, name: str, state: JobState, **parts: bytes | None) -> None:
        record = Job(JobId(name), name, "me", JobState.SUBMITTED, Reason.NONE, b"{}", 1.0, 1.0, **parts)  # type: ignore[arg-type]
        await self.store.commit(PutJob(record))
        for version, passed in enumerate(PATH_TO[state], start=1):
            event = AppendEvent("job", JobId(name), payload={"state": passed.value})
            await self.store.commit(PutJob(replace(record, state=passed), version), event)

    async def here(self, *manifests: Manifest) -> list[bool]:
        return [self.blobs.path(manifest.files[0].digest).exists() for manifest in manifests]


def run(tmp_path: Path, body: Callable[[House], Awaitable[None]]) -> None:
    asyncio.run(body(House(tmp_path)))


def test_what_an_unfinished_job_needs_stays_and_of_an_ended_one_its_code_and_result(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        names = ("code", "data", "test", "weights", "checkpoint", "result")
        mine = {name: await house.blob(f"running {name}".encode()) for name in names}
        over = {name: await house.blob(f"ended {name}".encode()) for name in names}
        for job, state, files in (("j-1", JobState.RUNNING, mine), ("j-2", JobState.FAILED, over)):
            parts = {f"{name}_json": documents.encode(files[name]) for name in names}
            await house.job(job, state, **parts)
        house.now += KEEP_S + 1
        collected = await house.garbage.collect()
        assert await house.here(*mine.values()) == [True] * 6
        assert dict(zip(names, await house.here(*over.values()), strict=True)) == {
            "code": True,
            "data": False,
            "test": False,
            "weights": False,
            "checkpoint": False,
            "result": True,
        }
        assert collected.blobs == 4

    run(tmp_path, body)


def test_the_result_of_a_job_that_came_and_ended_between_two_collections_stays(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        await house.garbage.collect()
        results = []
        for number in range(3):
            results.append(await house.blob(f"result {number}".encode()))
            await house.job(f"j-{number}", JobState.FAILED, result_json=documents.encode(results[-1]))
            house.now += KEEP_S + 1
            await house.garbage.collect()
        assert await house.here(*results) == [True] * 3

    run(tmp_path, body)


def test_what_is_uploaded_for_a_job_that_comes_later_stays_for_a_day(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        uploaded = await house.blob(b"data")
        house.now += KEEP_S - 1
        await house.garbage.collect()
        assert await house.here(uploaded) == [True]
        # asked for again: `hive submit` found it here and does not send it a second time
        assert await house.blobs.missing([uploaded.files[0].digest]) == ()
        os.utime(house.blobs.path(uploaded.files[0].digest), (house.now, house.now))
        house.now += KEEP_S - 1
        await house.garbage.collect()
        assert await house.here(uploaded) == [True]
        house.now += 2
        await house.garbage.collect()
        assert await house.here(uploaded) == [False]

    run(tmp_path, body)


def test_a_checkpoint_that_two_newer_ones_replaced_goes_within_minutes(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        one, two, three = [await house.blob(content) for content in (b"one", b"two", b"three")]
        newest = documents.encode(Checkpoint(30, 30, three))
        await house.job("j-1", JobState.RUNNING, checkpoint_json=newest)
        house.garbage.replaced(JobId("j-1"), one)
        await house.garbage.collect()
        house.garbage.replaced(JobId("j-1"), two)
        await house.garbage.collect()
        assert await house.here(one, two, three) == [True] * 3  # somebody may be fetching it
        house.now += KEEP_REPLACED_S + 1
        assert (await house.garbage.collect()).blobs == 1
        assert await house.here(one, two, three) == [False, True, True]

    run(tmp_path, body)


def test_a_replaced_checkpoint_with_the_content_of_somebodys_result_stays(tmp_path: Path) -> None:
    """Training is deterministic: the same job again makes the same weights."""

    async def body(house: House) -> None:
        same, other = await house.blob(b"the same weights"), await house.blob(b"later weights")
        await house.job("j-1", JobState.FAILED, result_json=documents.encode(same))
        await house.job("j-2", JobState.RUNNING)
        house.garbage.replaced(JobId("j-2"), same)
        house.garbage.replaced(JobId("j-2"), other)
        house.now += KEEP_REPLACED_S + 1
        await house.garbage.collect()
        assert await house.here(same) == [True]

    run(tmp_path, body)


def test_the_last_checkpoints_of_a_job_that_ended_go_too(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        kept = await house.blob(b"weights")
        house.garbage.replaced(JobId("j-ended"), kept)
        house.garbage.replaced(JobId("j-ended"), Manifest((FileEntry("gone", Digest("a" * 64), 1),)))
        house.now += KEEP_REPLACED_S + 1
        await house.garbage.collect()
        assert await house.here(kept) == [False]

    run(tmp_path, body)
