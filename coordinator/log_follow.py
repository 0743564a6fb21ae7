"""One rank's output as a stream: what is there, then what comes, until the job has ended. Never ends before it.

The job's end is looked up before the output is read for the last time: every line of a job is written before its end.
Other jobs' output wakes all followers, so what a wake costs is one look at a file's size.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

from coordinator.job_folder import JobFolders
from coordinator.records import Job
from coordinator.store.protocol import Store
from protos import limits
from protos.errors import NotFound
from protos.gen import jobs_pb2
from protos.ids import JobId
from protos.states import TERMINAL_JOB_STATES

_LOOK_AGAIN_S = 1.0  # for the job's end, which is no output


async def follow_logs(
    store: Store, folders: JobFolders, job_id: JobId, rank: int, after_bytes: int, follow: bool
) -> AsyncIterator[jobs_pb2.LogChunk]:
    """Chunks from a byte position on; the last one says `finished` when the job has ended."""
    path = folders.log_path(job_id, rank)
    position = after_bytes
    looked_s = -_LOOK_AGAIN_S
    ended, state = False, ""
    while True:
        changed = folders.changed
        if time.monotonic() - looked_s >= _LOOK_AGAIN_S:
            looked_s = time.monotonic()
            job = await store.job(job_id)
            if job is None:
                raise NotFound(f"no job {job_id}", "hive ps --all lists all jobs")
            ended, state = job.state in TERMINAL_JOB_STATES, job.state.value
            _check_rank(job, rank, path, ended or not follow)
        while _size(path) > position and (text := await asyncio.to_thread(_read, path, position)):
            position += len(text)
            yield jobs_pb2.LogChunk(text=text, end_bytes=position, state=state)
        if ended or not follow:
            yield jobs_pb2.LogChunk(end_bytes=position, finished=ended, state=state)
            return
        try:
            async with asyncio.timeout(max(0.0, looked_s + _LOOK_AGAIN_S - time.monotonic())):
                await changed.wait()
        except TimeoutError:
            continue


def _check_rank(job: Job, rank: int, path: Path, final: bool) -> None:
    """A rank that printed is there, and one of the plan; before there is a plan, a follower of any rank waits."""
    planned = len(json.loads(job.plan_json)["subtasks"]) if job.plan_json else 0
    if rank < max(planned, 1) or path.exists() or not (planned or final):
        return
    printed = {int(found.stem.removeprefix("rank-")) for found in path.parent.glob("rank-*.log")}
    there = sorted(printed | set(range(max(planned, 1))))
    raise NotFound(f"job {job.job_id} has no rank {rank}", f"its ranks are {', '.join(map(str, there))}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read(path: Path, position: int) -> bytes:
    """Up to a chunk from a position, ending at a line where possible: a torn UTF-8 character is left for later."""
    with path.open("rb") as file:
        file.seek(position)
        text = file.read(limits.CHUNK_BYTES)
    end = text.rfind(b"\n") + 1
    return text[:end] if end else text
