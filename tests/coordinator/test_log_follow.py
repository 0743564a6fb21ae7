"""Following a rank's output: every line, in order, and the end exactly when the job has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.job_folder import ALL_RANKS, JobFolders
from coordinator.log_follow import follow_logs
from coordinator.records import Job
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import PutJob
from protos.errors import NotFound
from protos.gen import jobs_pb2
from protos.ids import JobId
from protos.states import JobState, Reason

J = JobId("j-1")
PATH_TO_THE_END = (JobState.PLANNING, JobState.QUEUED, JobState.STARTING, JobState.RUNNING, JobState.SUCCEEDED)


class House:
    def __init__(self, folder: Path) -> None:
        self.store = MemoryStore()
        self.folders = JobFolders(folder)
        self.record = Job(J, "job", "me", JobState.SUBMITTED, Reason.NONE, b"{}", 1.0, 1.0)

    async def submit(self) -> None:
        await self.store.commit(PutJob(self.record))
        self.record = replace(self.record, version=1)

    async def become(self, *states: JobState) -> None:
        for state in states:
            await self.store.commit(PutJob(replace(self.record, state=state), self.record.version))
            self.record = replace(self.record, version=self.record.version + 1)

    async def read(self, rank: int = 0, after: int = 0, follow: bool = False) -> list[jobs_pb2.LogChunk]:
        return [chunk async for chunk in follow_logs(self.store, self.folders, J, rank, after, follow)]


def run(tmp_path: Path, body: Callable[[House], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            house = House(tmp_path)
            await house.submit()
            await body(house)

    asyncio.run(main())


def test_a_follower_gets_every_line_and_ends_with_the_job(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        house.folders.append_log(J, 0, ["before"])
        following = asyncio.create_task(house.read(follow=True))
        for number in range(50):
            house.folders.append_log(J, 0, [f"line {number}"])
            house.folders.append_log(JobId("j-other"), 0, ["not mine"])
            await asyncio.sleep(0)
        await house.become(*PATH_TO_THE_END[:-1])
        house.folders.append_log(J, 0, ["the last line"])
        await house.become(JobState.SUCCEEDED)
        chunks = await following
        text = b"".join(chunk.text for chunk in chunks).decode()
        assert text == "before\n" + "".join(f"line {n}\n" for n in range(50)) + "the last line\n"
        assert [chunk.finished for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].state == "SUCCEEDED" and chunks[-1].end_bytes == len(text)

    run(tmp_path, body)


def test_a_line_written_between_the_look_at_the_job_and_the_look_at_the_file_is_not_lost(tmp_path: Path) -> None:
    """1 the follower reads the job: it runs 2 the last line is written 3 the job ends 4 the follower reads the file and
    must not take that for the end without having looked at the job again."""

    async def body(house: House) -> None:
        await house.become(*PATH_TO_THE_END[:-1])

        class Store(MemoryStore):
            looked = 0

            async def job(self, job_id: JobId) -> Job | None:
                found = await house.store.job(job_id)
                self.looked += 1
                if self.looked == 1:
                    house.folders.append_log(J, 0, ["the last line"])
                    await house.become(JobState.SUCCEEDED)
                return found

        store = Store()
        chunks = [chunk async for chunk in follow_logs(store, house.folders, J, 0, 0, True)]
        assert b"".join(chunk.text for chunk in chunks) == b"the last line\n"
        assert chunks[-1].finished and store.looked == 2

    run(tmp_path, body)


def test_a_position_is_where_one_goes_on_and_a_rank_is_its_own_stream(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        house.folders.append_log(J, 0, ["zero", "grüße"])
        house.folders.append_log(J, 1, ["one"])
        first = (await house.read())[0]
        assert (await house.read(after=first.end_bytes))[0].text == b""
        assert (await house.read(after=5))[0].text.decode() == "grüße\n"
        assert (await house.read(rank=1))[0].text == b"one\n"
        assert (await house.read(rank=ALL_RANKS))[0].text.count(b"[rank ") == 3
        with pytest.raises(NotFound, match="no rank 7") as refused:
            await house.read(rank=7)
        assert refused.value.hint == "its ranks are 0, 1"
        assert not (await house.read())[-1].finished  # the job goes on

    run(tmp_path, body)


def test_output_larger_than_a_message_comes_in_whole_lines(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        for _ in range(30):
            house.folders.append_log(J, 0, ["ü" * 4000] * 10)
        chunks = await house.read()
        texts = [chunk.text for chunk in chunks if chunk.text]
        assert len(texts) > 1 and all(text.endswith(b"\n") and len(text) <= 2**20 for text in texts)
        assert b"".join(texts).decode().count("\n") == 300

    run(tmp_path, body)


def test_a_rank_of_the_plan_is_there_before_it_printed_and_others_are_not(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        house.record = replace(house.record, plan_json=b'{"subtasks": [{"rank": 0}, {"rank": 1}]}')
        await house.become(JobState.PLANNING)
        assert (await house.read(rank=1))[0].text == b""
        assert (await house.read(rank=ALL_RANKS))[0].text == b""
        for follow in (False, True):
            with pytest.raises(NotFound, match="no rank 99") as refused:
                await house.read(rank=99, follow=follow)
            assert refused.value.hint == "its ranks are 0, 1"

    run(tmp_path, body)


def test_a_job_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        with pytest.raises(NotFound):
            async for _ in follow_logs(house.store, house.folders, JobId("j-none"), 0, 0, True):
                pass

    run(tmp_path, body)
