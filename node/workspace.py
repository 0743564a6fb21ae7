"""A task's files on this node: fetched by digest, laid out below HIVE_HOME/node/jobs/JOB, removed when it is over.

Checkpoints are shared by all groups of a job on this node; code, data and output belong to one attempt. Refuses a job
id that is not one: it comes from the coordinator and becomes the name of a folder.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from node.cache import BlobCache
from protos.artifact import Manifest
from protos.errors import HiveError, SpecError
from protos.ids import Digest, JobId
from protos.log import Log
from protos.work import Task
from strategies.checkpoint_name import CheckpointName, parse_folder
from strategies.context import Workspace

log = Log("hive.node.workspace")

Fetch = Callable[[Digest, Path, int], Awaitable[None]]
_KEEP_IDLE_S = 2 * 86_400.0
_JOB_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


class Workspaces:
    def __init__(self, root: Path, cache: BlobCache, fetch: Fetch) -> None:
        self._root = root
        self._cache = cache
        self._fetch = fetch
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _attempt_dir(self, task: Task, suffix: str) -> Path:
        return self._job_dir(task.job_id) / f"attempt-{task.fence}-{task.rank}{suffix}"

    def _job_dir(self, job_id: JobId) -> Path:
        if not _JOB_ID.fullmatch(job_id):
            raise SpecError(f"{job_id[:80]!r} is not the id of a job", "is the coordinator a different version?")
        return self._root / job_id

    def checkpoint_dir(self, job_id: JobId) -> Path:
        return self._job_dir(job_id) / "checkpoints"

    def staging_dir(self, task: Task, step: int) -> Path:
        """Where a checkpoint lies while it is uploaded, whatever its worker does to the original."""
        return self._job_dir(task.job_id) / f"uploading-{task.fence}-{task.rank}-{step}"

    async def prepare(self, task: Task, suffix: str = "") -> Workspace:
        """Everything the task names, here. Raises HiveError when a file cannot be had or the disk is full."""
        folder = self._attempt_dir(task, suffix)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, mode=0o700)
        owner = str(folder)
        self._cache.pin(owner, [m for m in (task.code, task.data, task.test, task.weights) if m is not None])
        code = await self._lay_out(task.code, folder / "code")
        data = await self._lay_out(task.data, folder / "data")
        test = await self._lay_out(task.test, folder / "test")
        weights = await self._lay_out(task.weights, folder / "weights")
        checkpoints = self.checkpoint_dir(task.job_id)
        checkpoints.mkdir(exist_ok=True, mode=0o700)
        await self._take_up(task, checkpoints)
        output = folder / "output"
        output.mkdir(mode=0o700)
        return Workspace(
            code,
            _single(task.data, data, task.spec.data.source),
            _single(task.test, test, task.spec.data.test or ""),
            _single(task.weights, weights, task.spec.model.weights or task.spec.model.source),
            checkpoints,
            output,
        )

    async def _lay_out(self, manifest: Manifest | None, folder: Path) -> Path | None:
        if manifest is None:
            return None
        return await self._cache.materialise(manifest, folder, self._fetch)

    async def _take_up(self, task: Task, checkpoints: Path) -> None:
        """The committed checkpoint that the coordinator has, unless a newer one lies here already."""
        if task.resume is None:
            return
        names = [parse_folder(path.name) for path in checkpoints.glob("step-*")]
        if max((name.step for name in names if name and name.whole), default=-1) >= task.resume.step:
            return
        arriving = checkpoints / f".arriving-{task.fence}-{task.rank}"
        shutil.rmtree(arriving, ignore_errors=True)
        try:
            await self._cache.materialise(task.resume.manifest, arriving, self._fetch)
        except HiveError as error:  # a peer may still have a newer state, and if not the job begins again
            log.warning("checkpoint not fetched", job=task.job_id, step=task.resume.step, reason=error.message)
            shutil.rmtree(arriving, ignore_errors=True)
            return
        try:
            arriving.rename(checkpoints / CheckpointName(task.resume.step).folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            shutil.rmtree(arriving, ignore_errors=True)  # another rank of this node was first with the same

    def newest_checkpoint(self, task: Task) -> tuple[CheckpointName, Path] | None:
        """The newest that this attempt can have written: a whole one, or its rank's part under its fence."""
        named = [(parse_folder(path.name), path) for path in self.checkpoint_dir(task.job_id).glob("step-*")]
        own = [(name, path) for name, path in named if name and (name.whole or _is_part_of(name, task))]
        return max(own, default=None)

    def close_attempt(self, task: Task, suffix: str = "") -> None:
        """The attempt's own files go; the job's checkpoints stay for the next group, its folder while it has any."""
        folder = self._attempt_dir(task, suffix)
        self._cache.unpin(str(folder))
        shutil.rmtree(folder, ignore_errors=True)
        checkpoints = self.checkpoint_dir(task.job_id)
        with contextlib.suppress(OSError):  # not empty, or not there
            if list(folder.parent.iterdir()) == [checkpoints]:
                checkpoints.rmdir()
            folder.parent.rmdir()

    def close_job(self, job_id: JobId) -> None:
        shutil.rmtree(self._job_dir(job_id), ignore_errors=True)

    def sweep(self, busy: frozenset[JobId]) -> None:
        """Jobs that nobody asked about for days. Blocks."""
        for folder in self._root.iterdir():
            with contextlib.suppress(FileNotFoundError):  # its last attempt ended meanwhile
                if folder.name not in busy and time.time() - folder.stat().st_mtime > _KEEP_IDLE_S:
                    shutil.rmtree(folder, ignore_errors=True)


def _single(manifest: Manifest | None, folder: Path | None, source: str) -> Path | None:
    """The file itself where the job names a file, the folder where it names a folder."""
    if manifest is None or folder is None:
        return None
    only = manifest.files[0].path if len(manifest.files) == 1 else None
    return folder / only if only is not None and Path(source).name == only else folder


def _is_part_of(name: CheckpointName, task: Task) -> bool:
    """Whether a part is what this rank wrote: a stage of a pipeline, or the shards of a rank."""
    stages = len(task.layout.stages) if task.layout is not None else 1
    return name.fence == task.fence and name.part == (task.rank % stages if stages > 1 else task.rank)
