"""The node's files by digest: fetched once, kept below a byte limit, laid out as a manifest says for a task.

Owns what is in the cache folder, which blobs running jobs hold (pins), and the shortcut for shared paths: a file that
lies at its origin here, with the same content, is used there and not copied. Refuses a manifest with unsafe paths.
Invariants: a blob in place is whole and checked, and checked again when it was touched since; what a workspace gets is
read-only; at most `max_fetches` transfers at a time, and a broken one goes on where it stopped, also after a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from node.known_files import KnownFiles
from protos.artifact import FileEntry, Manifest, check_digest, check_manifest, digest_bytes
from protos.errors import Blame, ErrorCode, HiveError, NotFound
from protos.ids import Digest
from protos.partial_file import disk_error

Fetch = Callable[[Digest, Path, int], Awaitable[None]]  # digest, destination, bytes: protos.transfer.get_file, bound

DEFAULT_MAX_BYTES = 20 * 1024**3
SMALL_BYTES = 1024 * 1024  # up to here a file is copied: it may be edited at its origin while the job runs
ABANDONED_S = 7 * 86_400.0
_FICLONE = 0x40049409


@dataclass(frozen=True, slots=True)
class _Blob:
    digest: Digest
    path: Path
    bytes: int
    used_ns: int


class BlobCache:
    def __init__(self, folder: Path, max_bytes: int = DEFAULT_MAX_BYTES, max_fetches: int = 4) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._max_bytes = max_bytes
        self._known = KnownFiles(folder / "known.json")
        self._turns = asyncio.Semaphore(max_fetches)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._pins: dict[str, frozenset[Digest]] = {}
        self._busy: Counter[Digest] = Counter()  # being laid out
        self._guard = threading.Lock()  # between taking a blob into use and removing it

    def path(self, digest: str) -> Path:
        """Where a blob lies or would lie. Raises SpecError for what is not a digest."""
        checked = check_digest(digest)
        return self._folder / checked[:2] / checked[2:]

    def held(self, digest: Digest) -> Path | None:
        """The blob, checked, if it is in the cache; it counts as used now. Blocks."""
        return self.path(digest) if self._cached(digest) else None

    def pin(self, owner: str, manifests: Iterable[Manifest]) -> None:
        """Keep these until `unpin`: an owner is a job, or an attempt, that may need them again."""
        with self._guard:
            self._pins[owner] = frozenset(entry.digest for manifest in manifests for entry in manifest.files)

    def unpin(self, owner: str) -> None:
        with self._guard:
            self._pins.pop(owner, None)

    async def present(self, manifest: Manifest) -> frozenset[Digest]:
        """Digests that need no transfer to this node: in the cache, or the same file lies at its origin here."""
        check_manifest(manifest)

        def look() -> frozenset[Digest]:
            return frozenset(e.digest for e in manifest.files if self._cached(e.digest) or self._at_origin(e))

        return await asyncio.to_thread(look)

    async def materialise(self, manifest: Manifest, destination: Path, fetch: Fetch) -> Path:
        """Lay the files out below `destination` by their paths, read-only; returns `destination`.

        Large files are linked (to the origin, or to the cache by reflink or hard link), small ones copied. Raises what
        `fetch` raises, and Exhausted when the disk is full.
        """
        check_manifest(manifest)
        unique = {entry.digest: entry for entry in manifest.files}
        with self._guard:
            self._busy.update(unique.keys())
        try:
            sources = await self._sources(unique.values(), fetch)
            await asyncio.to_thread(_lay_out, manifest, sources, destination)
        finally:
            with self._guard:
                self._busy.subtract(unique.keys())
                self._busy += Counter()  # drops the zeros
        return destination

    async def _sources(self, entries: Iterable[FileEntry], fetch: Fetch) -> dict[Digest, Path]:
        sources: dict[Digest, Path] = {}

        async def find(entry: FileEntry) -> None:
            sources[entry.digest] = await self._source(entry, fetch)

        try:
            async with asyncio.TaskGroup() as group:
                for entry in entries:
                    group.create_task(find(entry))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return sources

    async def _source(self, entry: FileEntry, fetch: Fetch) -> Path:
        """The blob in the cache, fetched if need be, or a large file at its origin."""
        lock = self._locks.setdefault(entry.digest, asyncio.Lock())
        async with lock, self._turns:
            if path := await asyncio.to_thread(self._local, entry):
                return path
            await asyncio.to_thread(self._make_room, entry.bytes)
            path = self.path(entry.digest)
            path.parent.mkdir(exist_ok=True)
            try:
                await fetch(entry.digest, path, entry.bytes)
            except NotFound as error:
                if entry.origin:
                    raise NotFound(
                        f"{entry.path} is neither stored nor, as it was, at {entry.origin} on this machine",
                        "let this machine see that path too; if the file was changed or moved, submit the job again",
                        code=ErrorCode.DATA_UNUSABLE,
                        blame=Blame.NODE,  # another one may see the path
                    ) from error
                raise
            if path.stat().st_size != entry.bytes:
                raise HiveError(f"{entry.path}: the blob has another size than its manifest", code=ErrorCode.CORRUPT)
            path.chmod(0o444)
            self._known.verified(path, entry.digest)
            return path

    def _local(self, entry: FileEntry) -> Path | None:
        if self._cached(entry.digest):
            return self.path(entry.digest)
        if not self._at_origin(entry):
            return None
        origin = Path(entry.origin)
        if entry.bytes > SMALL_BYTES:
            return origin
        content = origin.read_bytes()
        return self._keep(entry.digest, content) if digest_bytes(content) == entry.digest else None

    def _cached(self, digest: Digest) -> bool:
        """Whether the blob is here and still what it was; marks it as used."""
        path = self.path(digest)
        if not path.exists():
            return False
        if self._known.digest(path) != digest:  # somebody wrote through a link
            path.unlink(missing_ok=True)
            return False
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        return True

    def _at_origin(self, entry: FileEntry) -> bool:
        origin = Path(entry.origin)
        try:
            same_size = bool(entry.origin) and origin.is_absolute() and origin.stat().st_size == entry.bytes
        except (OSError, ValueError):
            return False
        return same_size and self._known.digest(origin) == entry.digest

    def _keep(self, digest: Digest, content: bytes) -> Path:
        path = self.path(digest)
        path.parent.mkdir(exist_ok=True)
        fresh = path.with_name(path.name + ".partial")
        try:
            fresh.write_bytes(content)
            fresh.chmod(0o444)
            fresh.replace(path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise disk_error(error, path) from error
        self._known.verified(path, digest)
        return path

    def _make_room(self, n_bytes: int) -> None:
        """Remove the blobs used longest ago until `n_bytes` more fit. Pinned ones stay, even over the limit."""
        blobs = sorted(self._blobs(), key=lambda blob: blob.used_ns)
        excess = sum(blob.bytes for blob in blobs) + n_bytes - self._max_bytes
        for blob in blobs:
            if excess <= 0:
                return
            with self._guard:
                if blob.digest not in self._busy and not any(blob.digest in pinned for pinned in self._pins.values()):
                    blob.path.unlink(missing_ok=True)
                    excess -= blob.bytes

    def _blobs(self) -> list[_Blob]:
        """What is in place; abandoned transfers are removed on the way."""
        found = []
        for path in self._folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix != ".partial":
                    digest = Digest(path.parent.name + path.name)
                    found.append(_Blob(digest, path, status.st_size, status.st_atime_ns))
                elif time.time() - status.st_mtime > ABANDONED_S:
                    path.unlink()
        return found


def _lay_out(manifest: Manifest, sources: dict[Digest, Path], destination: Path) -> None:
    destination.mkdir(parents=True, exist_ok=True)
    cached = {digest for digest, path in sources.items() if path.name == digest[2:]}
    for entry in manifest.files:
        target, source = destination / entry.path, sources[entry.digest]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            if entry.digest not in cached:
                target.symlink_to(source)
            else:
                _place(source, target, entry.bytes)
        except OSError as error:
            raise disk_error(error, target) from error


def _place(source: Path, target: Path, n_bytes: int) -> None:
    if n_bytes > SMALL_BYTES:
        if _reflink(source, target):
            target.chmod(0o444)
            return
        with contextlib.suppress(OSError):  # another file system, or one without hard links
            os.link(source, target)
            return
    shutil.copyfile(source, target)
    target.chmod(0o444)


def _reflink(source: Path, target: Path) -> bool:
    """Share the blocks, copy on write; False where the file system cannot."""
    try:
        with source.open("rb") as reading, target.open("wb") as writing:
            fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
        return True
    except OSError:
        target.unlink(missing_ok=True)
        return False
