"""A task's files on this node: where they lie, what is refused, what is left behind."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from node_bench import make_task, run_async

from node.cache import BlobCache
from node.workspace import Workspaces
from protos.artifact import FileEntry, Manifest, digest_bytes
from protos.errors import Exhausted, HiveError, NotFound, SpecError
from protos.ids import Digest, Fence, JobId
from protos.plan import Layout
from protos.work import Resume, Task


class Coordinator:
    """Blobs by digest; `full` is this machine's disk."""

    def __init__(self) -> None:
        self.blobs: dict[Digest, bytes] = {}
        self.full = False

    def manifest(self, **files: bytes) -> Manifest:
        entries = []
        for name, content in files.items():
            digest = digest_bytes(content)
            self.blobs[digest] = content
            entries.append(FileEntry(name.replace("__", "."), digest, len(content)))
        return Manifest(tuple(entries))

    async def fetch(self, digest: Digest, destination: Path, n_bytes: int) -> None:
        if self.full:
            raise Exhausted("the disk is full", "free some space")
        if digest not in self.blobs:
            raise NotFound(f"artifact {digest} is not here")
        destination.write_bytes(self.blobs[digest])


def made(folder: Path) -> tuple[Workspaces, Coordinator]:
    coordinator = Coordinator()
    return Workspaces(folder / "jobs", BlobCache(folder / "cache"), coordinator.fetch), coordinator


def task(fence: int = 1, **changes: object) -> Task:
    return replace(make_task("returns"), fence=Fence(fence), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("job_id", ["", ".", "..", "../../etc", "/etc", "a/b", "a\0b", "j-" + "a" * 100, "J-A", "-j"])
def test_a_job_id_that_is_none_never_becomes_a_folder(tmp_path: Path, job_id: str) -> None:
    workspaces, _ = made(tmp_path)
    bad = task(job_id=JobId(job_id))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SpecError, match="not the id of a job"):
        run_async(workspaces.prepare(bad))
    for refuse in (workspaces.close_job, workspaces.checkpoint_dir):
        with pytest.raises(SpecError):
            refuse(JobId(job_id))
    with pytest.raises(SpecError):
        workspaces.newest_checkpoint(bad)
    assert sorted(tmp_path.rglob("*")) == before


def test_files_lie_where_the_task_looks_for_them_and_output_is_fresh(tmp_path: Path) -> None:
    workspaces, coordinator = made(tmp_path)
    given = task(
        code=coordinator.manifest(model__py=b"def build(): ...", helpers__py=b""),
        data=coordinator.manifest(digits=b"rows"),
    )

    async def body() -> None:
        workspace = await workspaces.prepare(given)
        assert workspace.code_dir is not None and (workspace.code_dir / "model.py").read_bytes() == b"def build(): ..."
        assert workspace.data_path is not None and workspace.test_path is None
        (workspace.output_dir / "left over").touch()
        again = await workspaces.prepare(given)
        assert list(again.output_dir.iterdir()) == []

    run_async(body())


def test_a_closed_attempt_leaves_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    workspaces, coordinator = made(tmp_path)
    given = task(code=coordinator.manifest(model__py=b"x"))

    async def body() -> None:
        workspace = await workspaces.prepare(given)
        (workspace.checkpoint_dir / "step-00000007").mkdir()
        workspaces.close_attempt(given)
        assert [path.name for path in (tmp_path / "jobs" / given.job_id).iterdir()] == ["checkpoints"]
        found = workspaces.newest_checkpoint(given)
        assert found is not None and (found[0].step, found[1]) == (7, workspace.checkpoint_dir / "step-00000007")
        workspaces.close_job(given.job_id)
        assert list((tmp_path / "jobs").iterdir()) == []

    run_async(body())


def test_short_tasks_leave_no_folder_and_do_not_touch_a_neighbours(tmp_path: Path) -> None:
    workspaces, _ = made(tmp_path)

    async def body() -> None:
        await workspaces.prepare(task(0), "-identify-1")
        workspaces.close_attempt(task(0), "-identify-1")
        assert list((tmp_path / "jobs").iterdir()) == []
        training = await workspaces.prepare(task(1))
        await workspaces.prepare(task(0), "-identify-2")
        workspaces.close_attempt(task(0), "-identify-2")
        assert training.checkpoint_dir.is_dir() and training.output_dir.is_dir()

    run_async(body())


def test_a_failed_preparation_holds_nothing_in_the_cache(tmp_path: Path) -> None:
    coordinator = Coordinator()
    cache = BlobCache(tmp_path / "cache", max_bytes=10)
    workspaces = Workspaces(tmp_path / "jobs", cache, coordinator.fetch)
    given = task(code=coordinator.manifest(model__py=b"12345"), data=Manifest((FileEntry("x", Digest("a" * 64), 1),)))

    async def body() -> None:
        with pytest.raises(NotFound):
            await workspaces.prepare(given)
        workspaces.close_attempt(given)
        other = replace(given, job_id=JobId("j-other"), code=coordinator.manifest(model__py=b"67890123"), data=None)
        await workspaces.prepare(other)  # room is made: what failed is not pinned
        assert given.code is not None and not cache.path(given.code.files[0].digest).exists()

    run_async(body())


def test_the_coordinators_checkpoint_is_taken_up_unless_a_newer_one_lies_here(tmp_path: Path) -> None:
    workspaces, coordinator = made(tmp_path)
    resumed = task(resume=Resume(10, coordinator.manifest(model__safetensors=b"ten")))

    async def body() -> None:
        workspace = await workspaces.prepare(resumed)
        assert (workspace.checkpoint_dir / "step-00000010" / "model.safetensors").read_bytes() == b"ten"
        (workspace.checkpoint_dir / "step-00000020").mkdir()
        older = task(2, resume=Resume(15, coordinator.manifest(model__safetensors=b"fifteen")))
        await workspaces.prepare(older)
        assert sorted(path.name for path in workspace.checkpoint_dir.iterdir()) == ["step-00000010", "step-00000020"]

    run_async(body())


def test_a_checkpoint_that_cannot_be_had_is_done_without(tmp_path: Path) -> None:
    workspaces, _ = made(tmp_path)
    gone = Manifest((FileEntry("model.safetensors", Digest("a" * 64), 1),))

    async def body() -> None:
        workspace = await workspaces.prepare(task(resume=Resume(10, gone)))
        assert list(workspace.checkpoint_dir.iterdir()) == []

    run_async(body())


def test_a_full_disk_is_said_as_such(tmp_path: Path) -> None:
    workspaces, coordinator = made(tmp_path)
    coordinator.full = True

    async def body() -> None:
        with pytest.raises(HiveError, match="disk is full"):
            await workspaces.prepare(task(code=coordinator.manifest(model__py=b"x")))

    run_async(body())


def test_what_nobody_asked_about_for_days_is_swept(tmp_path: Path) -> None:
    workspaces, _ = made(tmp_path)

    async def body() -> None:
        for name in ("j-old", "j-busy", "j-new"):
            await workspaces.prepare(replace(task(), job_id=JobId(name)))
        long_ago = time.time() - 3 * 86_400
        for name in ("j-old", "j-busy"):
            os.utime(tmp_path / "jobs" / name, (long_ago, long_ago))
        await asyncio.to_thread(workspaces.sweep, frozenset({JobId("j-busy")}))
        assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == ["j-busy", "j-new"]

    run_async(body())


def test_a_rank_hands_over_its_own_part_of_its_own_generation(tmp_path: Path) -> None:
    workspaces, _ = made(tmp_path)
    pipeline = Layout(((0, 1), (1, 2)), ("first",), replicas=2)
    mine = task(4, rank=3, world_size=4, layout=pipeline)  # the second stage of the second replica

    async def body() -> None:
        workspace = await workspaces.prepare(mine)
        for name in ("step-00000005", "step-00000009.fence-4.1-of-2", "step-00000011.fence-3.2-of-2"):
            (workspace.checkpoint_dir / name).mkdir()
        assert _newest(workspaces, mine) == "step-00000005"
        (workspace.checkpoint_dir / "step-00000009.fence-4.2-of-2").mkdir()
        assert _newest(workspaces, mine) == "step-00000009.fence-4.2-of-2"

    run_async(body())


def _newest(workspaces: Workspaces, given: Task) -> str:
    found = workspaces.newest_checkpoint(given)
    return found[1].name if found is not None else ""
