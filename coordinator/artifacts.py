"""The Artifacts service over the blobs: which are missing, bytes in, bytes out. Errors are raised, never aborted here.

Put: the reply says how many bytes are held, so an empty first chunk asks where to go on, and a chunk at another offset
ends the call with that answer. The content is checked when the last byte is there. One chunk is in memory per call: a
slow disk slows the sender.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from coordinator.blobs import BlobStore
from protos import limits
from protos.errors import DeadlineExceeded, SpecError
from protos.gen import artifacts_pb2 as pb
from protos.gen import artifacts_pb2_grpc


class ArtifactsService(artifacts_pb2_grpc.ArtifactsServicer):
    def __init__(self, blobs: BlobStore, idle_s: float = limits.CALL_DEADLINE_S) -> None:
        self._blobs = blobs
        self._idle_s = idle_s

    async def Missing(self, request: pb.MissingRequest, context: Any) -> pb.MissingReply:
        if len(request.digests) > limits.MAX_MANIFEST_FILES:
            raise SpecError(
                f"{len(request.digests)} digests in one question", f"ask for at most {limits.MAX_MANIFEST_FILES}"
            )
        return pb.MissingReply(digests=await self._blobs.missing(request.digests))

    async def Put(self, requests: AsyncIterator[pb.PutChunk], context: Any) -> pb.PutReply:
        chunk = await self._next(requests)
        if chunk is None:
            raise SpecError("an upload without a chunk", "is the other side a different version?")
        digest = chunk.digest
        async with self._blobs.receive(digest, chunk.total_bytes) as upload:
            complete = upload.complete
            while chunk is not None and not complete and chunk.offset == upload.held:
                if chunk.digest != digest:
                    raise SpecError("an upload of two digests in one call", "is the other side a different version?")
                complete = await upload.write(chunk.content)
                if not complete:
                    chunk = await self._next(requests)
            return pb.PutReply(digest=digest, bytes=upload.held)

    async def Get(self, request: pb.GetRequest, context: Any) -> AsyncIterator[pb.GetChunk]:
        async for offset, content, total in self._blobs.read(request.digest, request.offset, request.limit_bytes):
            yield pb.GetChunk(offset=offset, content=content, total_bytes=total)

    async def _next(self, requests: AsyncIterator[pb.PutChunk]) -> pb.PutChunk | None:
        try:
            async with asyncio.timeout(self._idle_s):
                return await anext(requests, None)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no chunk came for {self._idle_s:g} s", "the upload goes on where it stopped: try again"
            ) from None
