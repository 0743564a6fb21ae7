"""The client half of the Artifacts service: uploads and downloads by digest that survive broken streams.

Used by nodes, the CLI and the SDK. A transfer goes on where it stopped as long as it gets further; after `ATTEMPTS`
failures in a row without a byte more, the last error is raised. Content is checked against its digest before it
appears at its destination. Every wait for the other side is bounded by `IDLE_S`, never a whole transfer: files have no
size limit here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

from protos import dial, limits
from protos.artifact import check_digest, digest_file
from protos.errors import TABLE, DeadlineExceeded, ErrorCode, HiveError, SpecError, Unreachable
from protos.gen import artifacts_pb2 as pb
from protos.ids import Digest
from protos.partial_file import PartialFile

ATTEMPTS = 6
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0
IDLE_S = limits.CALL_DEADLINE_S


class Limiter(Protocol):
    """Waits until `n_bytes` may be sent or received."""

    async def take(self, n_bytes: int) -> None: ...


class _Patience:
    """Counts failures in a row without progress; raises the error when there were too many, else waits a little."""

    def __init__(self, attempts: int = ATTEMPTS) -> None:
        self._attempts = attempts
        self._failures = 0
        self._furthest = 0

    async def failed(self, error: HiveError, at_bytes: int) -> None:
        if at_bytes > self._furthest:
            self._furthest, self._failures = at_bytes, 0
        self._failures += 1
        if not TABLE[error.code].retryable or self._failures >= self._attempts:
            raise error
        delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (self._failures - 1))
        await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))


async def missing(stub: Any, digests: Iterable[Digest]) -> frozenset[Digest]:
    """Those the coordinator does not hold."""
    asked = sorted(set(digests))
    absent: set[Digest] = set()
    for start in range(0, len(asked), limits.MAX_MANIFEST_FILES):
        request = pb.MissingRequest(digests=asked[start : start + limits.MAX_MANIFEST_FILES])
        try:
            reply = await stub.Missing(request, timeout=IDLE_S)
        except grpc.RpcError as error:
            raise _error(error) from None
        absent.update(check_digest(digest) for digest in reply.digests)
    return frozenset(absent)


async def put_file(stub: Any, path: Path, digest: Digest, limiter: Limiter | None = None) -> None:
    """Upload a file whose digest is known. Raises HiveError (corrupt) when the file is not what its digest says."""
    total = (await asyncio.to_thread(path.stat)).st_size
    patience = _Patience()
    held: int | None = 0 if total <= limits.CHUNK_BYTES else None  # None: ask first, there may be most of it
    while True:
        try:
            held = await _send(stub, path, digest, total, held, limiter)
            if held >= total:
                return
        except HiveError as error:
            if error.code is ErrorCode.CORRUPT and await asyncio.to_thread(digest_file, path) != digest:
                raise SpecError(f"{path} changed after it was read", "submit again when it is complete") from None
            await patience.failed(error, held or 0)
            held = None


async def _send(stub: Any, path: Path, digest: Digest, total: int, start: int | None, limiter: Limiter | None) -> int:
    """One call; how many bytes the coordinator holds after it. `start` None sends nothing and asks."""
    call = stub.Put()
    try:
        with contextlib.suppress(asyncio.InvalidStateError):  # the coordinator answered before everything was sent
            async for chunk in _chunks(path, digest, total, start):
                if limiter is not None:
                    await limiter.take(len(chunk.content))
                async with asyncio.timeout(IDLE_S):
                    await call.write(chunk)
            await call.done_writing()
        async with asyncio.timeout(IDLE_S):
            return int((await call).bytes)
    except TimeoutError:
        raise _silent() from None
    except grpc.RpcError as error:
        raise _error(error) from None
    finally:
        call.cancel()


async def _chunks(path: Path, digest: Digest, total: int, start: int | None) -> AsyncIterator[pb.PutChunk]:
    if start is None or total == 0:
        yield pb.PutChunk(digest=digest, total_bytes=total)
        return
    file = await asyncio.to_thread(path.open, "rb", buffering=0)
    with file:
        offset = await asyncio.to_thread(file.seek, start)
        while content := await asyncio.to_thread(file.read, min(limits.CHUNK_BYTES, total - offset)):
            yield pb.PutChunk(digest=digest, total_bytes=total, offset=offset, content=content)
            offset += len(content)


async def get_file(
    stub: Any,
    digest: Digest,
    destination: Path,
    n_bytes: int | None = None,
    limiter: Limiter | None = None,
    attempts: int = ATTEMPTS,
) -> None:
    """Download to `destination`, by way of `destination.partial`, which a later call takes up, from whatever source.

    Raises NotFound when the coordinator does not have it, HiveError (corrupt) when other content arrives under this
    digest or size, Exhausted when the disk is full.
    """
    partial = destination.with_name(destination.name + ".partial")
    patience = _Patience(attempts)
    while True:
        held = await asyncio.to_thread(_size, partial)
        try:
            return await _receive(stub, digest, destination, partial, held, n_bytes, limiter)
        except HiveError as error:
            if held and error.code is ErrorCode.INVALID_SPEC:  # what was here is longer than the blob: not a part of it
                await asyncio.to_thread(partial.unlink, missing_ok=True)
                continue
            await patience.failed(error, await asyncio.to_thread(_size, partial))


async def _receive(
    stub: Any,
    digest: Digest,
    destination: Path,
    partial: Path,
    offset: int,
    n_bytes: int | None,
    limiter: Limiter | None,
) -> None:
    """One call, from `offset` on; the partial file keeps what came when it breaks."""
    call = stub.Get(pb.GetRequest(digest=digest, offset=offset))
    file: PartialFile | None = None
    try:
        while chunk := await _next_chunk(call):
            if file is None:
                if n_bytes is not None and chunk.total_bytes != n_bytes:
                    raise HiveError(
                        f"{digest} has {chunk.total_bytes} bytes on the coordinator, {n_bytes} were announced",
                        "the manifest is wrong: submit the job again",
                        code=ErrorCode.INVALID_SPEC,
                    )
                file = await asyncio.to_thread(PartialFile, partial, digest, chunk.total_bytes)
            if chunk.offset != file.held:
                break
            if limiter is not None:
                await limiter.take(len(chunk.content))
            await asyncio.to_thread(file.write, chunk.content)
        if file is None or not file.complete:
            raise HiveError(f"the download of {digest} broke off", "try again", code=ErrorCode.UNREACHABLE)
        await asyncio.to_thread(file.finish, destination)
    except grpc.RpcError as error:
        raise _error(error) from None
    finally:
        call.cancel()
        if file is not None:
            file.close()


async def _next_chunk(call: Any) -> pb.GetChunk | None:
    try:
        async with asyncio.timeout(IDLE_S):
            chunk = await call.read()
    except TimeoutError:
        raise _silent() from None
    return chunk if isinstance(chunk, pb.GetChunk) else None  # grpc.aio.EOF


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _silent() -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the coordinator did not answer for {IDLE_S:g} s during a transfer", "it may be busy or frozen: try again"
    )


def _error(error: grpc.RpcError) -> HiveError:
    """What the coordinator said; a stream that broke, which grpc may call an error of its own, is Unreachable."""
    trailing: Any = error.trailing_metadata() if isinstance(error, grpc.aio.AioRpcError) else None
    said = any(key == dial.ERROR_KEY for key, _ in trailing or ())
    meant = dial.error_from(error, "its session port")
    if not said and meant.code in (ErrorCode.UNEXPECTED, ErrorCode.CANCELLED):
        return Unreachable(
            "the connection to the coordinator broke during a transfer", "try again: it goes on from there"
        )
    return meant
