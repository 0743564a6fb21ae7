"""Content by digest on the coordinator's disk: `ab/cdef...` below one folder, `partial/` for what is still arriving.

Owns space (limit per blob, a margin of the disk that stays free, bounded uploads) and collection of what nobody refers
to. Invariants: a file in place is whole, flushed and of its digest; a digest is checked before it becomes a path; one
upload of a digest at a time, later ones find what the first one brought.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from protos import limits
from protos.artifact import check_digest, digest_bytes
from protos.errors import Exhausted, NotFound, SpecError
from protos.ids import Digest
from protos.partial_file import PartialFile

MAX_BLOB_BYTES = 1 << 40
MARGIN_BYTES = 256 * 1024 * 1024
MAX_UPLOADS = 8


@dataclass(frozen=True, slots=True)
class Collected:
    blobs: int
    bytes: int


class Upload:
    """One blob arriving. `held` is how much is here; a blob that was already whole is complete from the start."""

    def __init__(self, destination: Path, file: PartialFile | None, held: int) -> None:
        self._destination = destination
        self._file = file
        self._whole = held

    @property
    def held(self) -> int:
        return self._whole if self._file is None else self._file.held

    @property
    def complete(self) -> bool:
        return self._file is None

    async def write(self, content: bytes) -> bool:
        """Append; the last byte brings the blob into place. True when it is complete.

        Raises SpecError, Exhausted, or HiveError (corrupt).
        """
        if self._file is not None:
            await asyncio.to_thread(self._write, self._file, content)
        return self.complete

    def _write(self, file: PartialFile, content: bytes) -> None:
        file.write(content)
        if file.complete:
            file.finish(self._destination)
            self._whole, self._file = file.held, None


class BlobStore:
    def __init__(
        self,
        folder: Path,
        max_blob_bytes: int = MAX_BLOB_BYTES,
        margin_bytes: int = MARGIN_BYTES,
        max_uploads: int = MAX_UPLOADS,
        wait_s: float = limits.CALL_DEADLINE_S,
    ) -> None:
        self._folder = folder
        self._partial = folder / "partial"
        self._partial.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._max_blob_bytes = max_blob_bytes
        self._margin_bytes = margin_bytes
        self._max_uploads = max_uploads
        self._wait_s = wait_s
        self._turns = asyncio.Semaphore(max_uploads)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of uploads under way
        self._promised_bytes = 0  # of uploads under way, not yet on the disk

    def path(self, digest: str) -> Path:
        """Where a blob lies or would lie. Raises SpecError for what is not a digest."""
        checked = check_digest(digest)
        return self._folder / checked[:2] / checked[2:]

    async def size(self, digest: str) -> int:
        """Raises NotFound when the blob is not here."""
        path = self.path(digest)
        try:
            return (await asyncio.to_thread(path.stat)).st_size
        except FileNotFoundError:
            raise _not_found(digest) from None

    async def missing(self, digests: Collection[str]) -> tuple[Digest, ...]:
        """Those not here. Asking for one that is here keeps it from collection for the minimum age again."""
        paths = {check_digest(digest): self.path(digest) for digest in digests}
        return await asyncio.to_thread(lambda: tuple(digest for digest, path in paths.items() if not _touch(path)))

    @contextlib.asynccontextmanager
    async def receive(self, digest: str, total_bytes: int) -> AsyncIterator[Upload]:
        """Room and a turn for one upload, resumed where an earlier one stopped.

        Raises Exhausted when the blob is too large, the disk too full or too many uploads run.
        """
        destination, checked = self.path(digest), check_digest(digest)
        if total_bytes > self._max_blob_bytes:
            raise Exhausted(
                f"a blob of {total_bytes} bytes is over the limit of {self._max_blob_bytes}", "cut the file into parts"
            )
        async with self._turn(checked):
            if await asyncio.to_thread(_touch, destination):
                yield Upload(destination, None, await self.size(digest))
                return
            self._check_room(total_bytes)
            file = await asyncio.to_thread(PartialFile, self._partial / checked, checked, total_bytes)
            promised = total_bytes - file.held
            self._promised_bytes += promised
            try:
                upload = Upload(destination, file, 0)
                if file.complete:
                    await upload.write(b"")
                yield upload
            finally:
                self._promised_bytes -= promised
                file.close()

    @contextlib.asynccontextmanager
    async def _turn(self, digest: Digest) -> AsyncIterator[None]:
        lock = self._locks.setdefault(digest, asyncio.Lock())
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self._wait_s):
                    await stack.enter_async_context(lock)
                    await stack.enter_async_context(self._turns)
            except TimeoutError:
                raise Exhausted(
                    f"{self._max_uploads} uploads, or another one of {digest}, are under way", "try again shortly"
                ) from None
            yield

    def _check_room(self, total_bytes: int) -> None:
        free = shutil.disk_usage(self._folder).free - self._promised_bytes - self._margin_bytes
        if total_bytes > free:
            raise Exhausted(
                f"{total_bytes} bytes do not fit on the coordinator's disk: {max(0, free)} are free for blobs",
                f"free space below {self._folder}, or give data as a path that the nodes share",
            )

    async def put_bytes(self, content: bytes) -> Digest:
        """Keep a small document of the coordinator's own."""
        digest = digest_bytes(content)
        async with self.receive(digest, len(content)) as upload:
            await upload.write(content[upload.held :])
        return digest

    async def read_bytes(self, digest: str, limit_bytes: int = limits.MAX_DOCUMENT_BYTES) -> bytes:
        """A small blob whole. Raises NotFound, or Exhausted when it is over the limit."""
        if (size := await self.size(digest)) > limit_bytes:
            raise Exhausted(f"{digest} has {size} bytes, over the limit of {limit_bytes}", "read it in chunks")
        return b"".join([content async for _, content, _ in self.read(digest)])

    async def read(self, digest: str, offset: int = 0, limit_bytes: int = 0) -> AsyncIterator[tuple[int, bytes, int]]:
        """(offset, content, total bytes) in chunks, at least one; `limit_bytes` 0 is to the end.

        Raises NotFound, and SpecError for an offset beyond the end. Reads only as fast as it is asked.
        """
        path, total = self.path(digest), await self.size(digest)
        if offset > total:
            raise SpecError(f"offset {offset} is beyond the {total} bytes of {digest}")
        end = total if limit_bytes == 0 else min(total, offset + limit_bytes)
        try:
            file = await asyncio.to_thread(path.open, "rb", buffering=0)
        except FileNotFoundError:
            raise _not_found(digest) from None
        with file:
            await asyncio.to_thread(file.seek, offset)
            while True:
                content = await asyncio.to_thread(file.read, min(limits.CHUNK_BYTES, end - offset))
                yield offset, content, total
                offset += len(content)
                if offset >= end or not content:
                    return

    def collect(self, live: Collection[str], minimum_age_s: float, now: float | None = None) -> Collected:
        """Remove blobs that are not live and, like abandoned uploads, older than `minimum_age_s`. Blocks.

        The age protects what was uploaded, or found to be here, for a job that is not submitted yet.
        """
        before = (time.time() if now is None else now) - minimum_age_s
        blobs = freed = 0
        for path in self._unreferenced(frozenset(live)):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if status.st_mtime < before:
                    path.unlink()
                    blobs, freed = blobs + 1, freed + status.st_size
        return Collected(blobs, freed)

    def _unreferenced(self, live: frozenset[str]) -> Iterator[Path]:
        for path in self._folder.glob("??/*"):
            if path.parent.name + path.name not in live:
                yield path
        for path in self._partial.iterdir():
            if path.name not in self._locks:  # no upload of it is under way
                yield path


def _touch(path: Path) -> bool:
    """Whether the file is there; if so its age starts anew."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _not_found(digest: str) -> NotFound:
    return NotFound(f"artifact {digest} is not here", "it was never uploaded, or was collected since: submit again")
