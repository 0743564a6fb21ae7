"""The node's blob cache: what is fetched, what is used where it lies, what stays and what goes."""

from __future__ import annotations

import asyncio
import os
import random
import stat
import time
from pathlib import Path

import pytest

from node.cache import SMALL_BYTES, BlobCache
from node.faults import failed_outcome
from node.known_files import SETTLED_S, KnownFiles
from protos.artifact import FileEntry, Manifest, digest_bytes
from protos.errors import Blame, ErrorCode, HiveError, NotFound, SpecError
from protos.ids import Digest
from protos.states import Reason

SMALL = b"def build():\n    pass\n"
LARGE = random.Random(0).randbytes(SMALL_BYTES + 1)


class Coordinator:
    """What a fetch reaches: contents by digest, and how often each was asked for."""

    def __init__(self, *contents: bytes) -> None:
        self.blobs = {digest_bytes(content): content for content in contents}
        self.asked: list[Digest] = []
        self.at_once = self.most_at_once = 0

    async def fetch(self, digest: Digest, destination: Path, n_bytes: int) -> None:
        self.asked.append(digest)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        if digest not in self.blobs:
            raise NotFound(f"artifact {digest} is not here")
        destination.write_bytes(self.blobs[digest])


def entry(path: str, content: bytes, origin: str = "") -> FileEntry:
    return FileEntry(path, digest_bytes(content), len(content), origin)


def old(path: Path, content: bytes) -> Path:
    """A file that was not just written, so that its digest may be remembered."""
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))
    return path


def test_files_are_fetched_once_and_laid_out_read_only(tmp_path: Path) -> None:
    async def main() -> None:
        coordinator = Coordinator(SMALL, LARGE)
        cache = BlobCache(tmp_path / "cache")
        files = (entry("model.py", SMALL), entry("lib/copy.py", SMALL), entry("data/train.npz", LARGE))
        for name in ("one", "two"):
            folder = await cache.materialise(Manifest(files), tmp_path / name, coordinator.fetch)
            assert (folder / "model.py").read_bytes() == (folder / "lib/copy.py").read_bytes() == SMALL
            assert (folder / "data/train.npz").read_bytes() == LARGE
            for file in files:
                assert stat.S_IMODE((folder / file.path).stat().st_mode) == 0o444
        assert sorted(coordinator.asked) == sorted({file.digest for file in files})
        again = BlobCache(tmp_path / "cache")
        assert await again.present(Manifest(files)) == {file.digest for file in files}

    asyncio.run(main())


def test_tasks_that_want_the_same_file_at_once_share_one_fetch(tmp_path: Path) -> None:
    async def main() -> None:
        contents = [bytes([n]) * 10 for n in range(20)]
        coordinator = Coordinator(*contents)
        cache = BlobCache(tmp_path / "cache", max_fetches=3)
        manifest = Manifest(tuple(entry(f"{n}", content) for n, content in enumerate(contents)))
        async with asyncio.TaskGroup() as group:
            for n in range(4):
                group.create_task(cache.materialise(manifest, tmp_path / f"task {n}", coordinator.fetch))
        assert len(coordinator.asked) == 20
        assert 1 < coordinator.most_at_once <= 3

    asyncio.run(main())


def test_a_large_file_on_a_shared_path_is_used_where_it_lies(tmp_path: Path) -> None:
    async def main() -> None:
        coordinator = Coordinator()
        cache = BlobCache(tmp_path / "cache")
        origin = old(tmp_path / "train.npz", LARGE)
        manifest = Manifest((entry("train.npz", LARGE, str(origin)),))
        assert await cache.present(manifest) == {manifest.files[0].digest}
        folder = await cache.materialise(manifest, tmp_path / "work", coordinator.fetch)
        assert (folder / "train.npz").readlink() == origin
        assert coordinator.asked == []
        assert not cache.path(manifest.files[0].digest).exists()

    asyncio.run(main())


def test_a_small_file_on_a_shared_path_is_copied_because_it_may_be_edited(tmp_path: Path) -> None:
    async def main() -> None:
        coordinator = Coordinator()
        cache = BlobCache(tmp_path / "cache")
        origin = old(tmp_path / "model.py", SMALL)
        manifest = Manifest((entry("model.py", SMALL, str(origin)),))
        folder = await cache.materialise(manifest, tmp_path / "work", coordinator.fetch)
        origin.write_bytes(b"changed")
        assert (folder / "model.py").read_bytes() == SMALL
        again = await cache.materialise(manifest, tmp_path / "again", coordinator.fetch)
        assert (again / "model.py").read_bytes() == SMALL
        assert coordinator.asked == []

    asyncio.run(main())


def test_an_origin_that_is_not_the_same_file_is_fetched_instead(tmp_path: Path) -> None:
    async def main() -> None:
        coordinator = Coordinator(LARGE)
        cache = BlobCache(tmp_path / "cache")
        other = bytearray(LARGE)
        other[-1] ^= 1
        os.mkfifo(tmp_path / "pipe")
        old(tmp_path / "other", bytes(other))
        for number, name in enumerate(["other", "pipe", "missing", "", "a\0b", "../relative"]):
            origin = str(tmp_path / name) if number < 3 else name
            manifest = Manifest((entry("train.npz", LARGE, origin),))
            if number == 0:
                assert await cache.present(manifest) == frozenset()
            folder = await cache.materialise(manifest, tmp_path / f"work {number}", coordinator.fetch)
            assert (folder / "train.npz").read_bytes() == LARGE
        assert len(coordinator.asked) == 1

    asyncio.run(main())


def test_an_origin_that_is_not_here_as_it_was_is_the_machines_so_that_another_is_tried(tmp_path: Path) -> None:
    async def main() -> None:
        cache = BlobCache(tmp_path / "cache")
        manifest = Manifest((entry("train.npz", LARGE, str(tmp_path / "gone.npz")),))
        with pytest.raises(NotFound, match=r"nor, as it was, at .*gone\.npz") as refused:
            await cache.materialise(manifest, tmp_path / "work", Coordinator().fetch)
        assert refused.value.code is ErrorCode.DATA_UNUSABLE
        assert "submit the job again" in refused.value.hint and "see that path" in refused.value.hint
        fault = failed_outcome(refused.value).fault
        assert fault is not None and fault.reason is Reason.DATA_UNUSABLE
        assert (fault.blame, fault.retryable) == (Blame.NODE, True)
        user = failed_outcome(SpecError("bad rows", code=ErrorCode.DATA_UNUSABLE)).fault
        assert user is not None and (user.blame, user.retryable) == (Blame.USER_CODE, False)

    asyncio.run(main())


def test_a_blob_that_was_written_through_a_link_is_fetched_again(tmp_path: Path) -> None:
    async def main() -> None:
        coordinator = Coordinator(LARGE)
        cache = BlobCache(tmp_path / "cache")
        manifest = Manifest((entry("train.npz", LARGE),))
        await cache.materialise(manifest, tmp_path / "one", coordinator.fetch)
        blob = cache.path(manifest.files[0].digest)
        blob.chmod(0o644)
        blob.write_bytes(bytes(len(LARGE)))
        os.utime(blob, (2e9, 2e9))
        folder = await cache.materialise(manifest, tmp_path / "two", coordinator.fetch)
        assert (folder / "train.npz").read_bytes() == LARGE
        assert len(coordinator.asked) == 2

    asyncio.run(main())


def test_the_files_used_longest_ago_go_first_and_pinned_ones_stay(tmp_path: Path) -> None:
    async def main() -> None:
        contents = [bytes([n]) * 100 for n in range(5)]
        coordinator = Coordinator(*contents)
        cache = BlobCache(tmp_path / "cache", max_bytes=300)
        manifests = [Manifest((entry("file", content),)) for content in contents]
        digests = [manifest.files[0].digest for manifest in manifests]
        cache.pin("job", [manifests[0]])
        for number in (0, 1, 2):
            await cache.materialise(manifests[number], tmp_path / f"a {number}", coordinator.fetch)
        await cache.materialise(manifests[1], tmp_path / "used again", coordinator.fetch)
        await cache.materialise(manifests[3], tmp_path / "a 3", coordinator.fetch)
        assert [cache.path(digest).exists() for digest in digests] == [True, True, False, True, False]
        cache.unpin("job")
        await cache.materialise(manifests[4], tmp_path / "a 4", coordinator.fetch)
        assert [cache.path(digest).exists() for digest in digests] == [False, True, False, True, True]
        assert (tmp_path / "a 0" / "file").read_bytes() == contents[0]

    asyncio.run(main())


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_an_unsafe_manifest_writes_nothing(path: str, tmp_path: Path) -> None:
    coordinator = Coordinator(SMALL)
    with pytest.raises(SpecError):
        manifest = Manifest((entry(path, SMALL),))
        asyncio.run(BlobCache(tmp_path / "cache").materialise(manifest, tmp_path / "work", coordinator.fetch))
    assert coordinator.asked == []
    assert not (tmp_path / "work").exists()


def test_a_fetch_that_fails_leaves_the_cache_usable(tmp_path: Path) -> None:
    async def main() -> None:
        coordinator = Coordinator(SMALL)
        cache = BlobCache(tmp_path / "cache")
        manifest = Manifest((entry("a", SMALL), entry("b", LARGE)))
        with pytest.raises(NotFound):
            await cache.materialise(manifest, tmp_path / "one", coordinator.fetch)
        coordinator.blobs[digest_bytes(LARGE)] = LARGE
        folder = await cache.materialise(manifest, tmp_path / "two", coordinator.fetch)
        assert (folder / "b").read_bytes() == LARGE

        async def short(digest: Digest, destination: Path, n_bytes: int) -> None:
            destination.write_bytes(b"x")

        with pytest.raises(HiveError, match="another size"):
            await cache.materialise(Manifest((entry("c", b"new"),)), tmp_path / "three", short)

    asyncio.run(main())


def test_a_known_file_is_not_read_again(tmp_path: Path) -> None:
    known = KnownFiles()
    path = old(tmp_path / "file", b"hello")
    assert known.digest(path) == digest_bytes(b"hello")
    path.write_bytes(b"jello")  # same size, inode and, put back, the same time: taken for the same file
    os.utime(path, (1e9, 1e9))
    assert known.digest(path) == digest_bytes(b"hello")
    os.utime(path, (1e9 + 1, 1e9 + 1))
    assert known.digest(path) == digest_bytes(b"jello")


def test_a_file_that_just_changed_is_hashed_each_time(tmp_path: Path) -> None:
    known = KnownFiles()
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    now = time.time() + SETTLED_S
    os.utime(path, (now, now))
    assert known.digest(path) == digest_bytes(b"hello")
    path.write_bytes(b"jello")
    os.utime(path, (now, now))
    assert known.digest(path) == digest_bytes(b"jello")


def test_digests_of_big_files_outlive_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.known_files.PERSIST_BYTES", 5)
    path = old(tmp_path / "file", b"hello")
    KnownFiles(tmp_path / "known.json").digest(path)
    path.write_bytes(b"jello")
    os.utime(path, (1e9, 1e9))
    assert KnownFiles(tmp_path / "known.json").digest(path) == digest_bytes(b"hello")
    (tmp_path / "known.json").write_text("{broken")
    assert KnownFiles(tmp_path / "known.json").digest(path) == digest_bytes(b"jello")


def test_only_regular_files_have_a_digest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    known = KnownFiles()
    assert [known.digest(tmp_path / name) for name in ("pipe", "", "missing")] == [None, None, None]
