"""Which blobs nobody needs any more: found from the records and the event log, removed while the coordinator runs.

Live are all files of unfinished jobs, and the results and code of ended ones; the data, weights and checkpoints of an
ended job are not. What is not live goes a day after it came or was last asked for, so that what is uploaded for a job
that is not submitted yet stays. Checkpoints come every minute and are large: one that two newer ones have replaced goes
within minutes. Records are read once; afterwards the event log says which jobs have ended.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from coordinator.blobs import BlobStore, Collected
from coordinator.records import Job
from coordinator.store.protocol import Store
from protos.artifact import Manifest
from protos.ids import JobId
from protos.log import Log
from protos.states import TERMINAL_JOB_STATES, JobState

log = Log("hive.coordinator.garbage")

EVERY_S = 600.0
KEEP_S = 86_400.0
KEEP_REPLACED_S = 600.0  # somebody may be fetching it
_PAGE = 1000
_EVERY_JOB = 1_000_000
_DIGEST = re.compile(rb"[0-9a-f]{64}")
_UNFINISHED = tuple(state for state in JobState if state not in TERMINAL_JOB_STATES)


class Garbage:
    def __init__(self, store: Store, blobs: BlobStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._blobs = blobs
        self._clock = clock
        self._of_ended: set[str] | None = None  # None until the records were read
        self._seq = 0
        self._previous: dict[JobId, Manifest] = {}
        self._replaced: set[str] = set()

    def replaced(self, job_id: JobId, checkpoint: Manifest) -> None:
        """A job has a newer checkpoint than this one, which stays until there is a still newer one."""
        before = self._previous.get(job_id)
        self._previous[job_id] = checkpoint
        if before is not None:
            self._replaced.update(entry.digest for entry in before.files)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                collected = await self.collect()
            except Exception:  # a full or broken disk: the next time may do
                log.exception("garbage not collected")
            else:
                if collected.blobs:
                    log.info("collected garbage", blobs=collected.blobs, bytes=collected.bytes)

    async def collect(self) -> Collected:
        live = await self._live()
        replaced = await asyncio.to_thread(self._remove_replaced, live)
        others = await asyncio.to_thread(self._blobs.collect, live, KEEP_S, self._clock())
        return Collected(replaced.blobs + others.blobs, replaced.bytes + others.bytes)

    async def _live(self) -> set[str]:
        seq = self._store.last_seq
        if self._of_ended is None:
            self._of_ended = set()
            for record in await self._store.jobs(TERMINAL_JOB_STATES, limit=_EVERY_JOB):
                self._of_ended |= _kept(record)
        else:
            await self._hear_of_ends(self._of_ended)
        self._seq = seq
        unfinished = await self._store.jobs(_UNFINISHED, limit=_EVERY_JOB)
        for job_id in self._previous.keys() - {record.job_id for record in unfinished}:
            self._replaced.update(entry.digest for entry in self._previous.pop(job_id).files)
        return self._of_ended.union(*(_needed(record) for record in unfinished))

    async def _hear_of_ends(self, kept: set[str]) -> None:
        after = self._seq
        while page := await self._store.events(after, kinds=("job",), limit=_PAGE):
            after = page[-1].seq
            for event in page:
                if event.job_id is not None and json.loads(event.payload_json).get("state") in TERMINAL_JOB_STATES:
                    record = await self._store.job(event.job_id)
                    kept |= _kept(record) if record is not None else set()

    def _remove_replaced(self, live: set[str]) -> Collected:
        blobs = freed = 0
        for digest in self._replaced - live:
            path: Path = self._blobs.path(digest)
            try:
                status = path.stat()
                if status.st_mtime >= self._clock() - KEEP_REPLACED_S:
                    continue
                path.unlink()
                blobs, freed = blobs + 1, freed + status.st_size
            except FileNotFoundError:
                pass
            self._replaced.discard(digest)
        return Collected(blobs, freed)


def _kept(ended: Job) -> set[str]:
    return _digests((ended.code_json, ended.result_json))


def _needed(job: Job) -> set[str]:
    inputs = (job.code_json, job.data_json, job.test_json, job.weights_json)
    return _digests((*inputs, job.checkpoint_json, job.result_json))


def _digests(parts: Iterable[bytes | None]) -> set[str]:
    return {found.decode() for document in parts if document for found in _DIGEST.findall(document)}
