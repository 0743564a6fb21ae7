"""Files to and from the coordinator over one channel, under the owner's upload cap."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from node.token_bucket import TokenBucket
from protos import dial, transfer
from protos.artifact import Artifact, FileEntry, Manifest, digest_file
from protos.credentials import Credential
from protos.errors import TABLE, HiveError
from protos.gen import artifacts_pb2_grpc, membership_pb2_grpc
from protos.gen import membership_pb2 as pb
from protos.ids import Digest

_BURST_S = 0.5
_PROBE_BYTES = 1024 * 1024
_PROBES = 3
_OLD_CHANNEL_S = 600.0


class UploadLimit:
    """protos.transfer.Limiter over a token bucket."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bucket = TokenBucket(bytes_per_s, bytes_per_s * _BURST_S, time.monotonic())

    async def take(self, n_bytes: int) -> None:
        await asyncio.sleep(self._bucket.take(n_bytes, time.monotonic()))


class Transfers:
    """`credential` is asked before the channel is opened, and again when its certificate was renewed."""

    def __init__(self, credential: Callable[[], Awaitable[Credential]], max_upload_bytes_per_s: float | None) -> None:
        self._credential = credential
        self._limiter = UploadLimit(max_upload_bytes_per_s) if max_upload_bytes_per_s else None
        self._open: tuple[Credential, Any] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def _channel(self) -> tuple[Credential, Any]:
        credential = await self._credential()
        if self._open is None or self._open[0] != credential:
            if self._open is not None:  # transfers under way end on the old channel
                self._closing.add(closing := asyncio.create_task(self._open[1].close(grace=_OLD_CHANNEL_S)))
                closing.add_done_callback(self._closing.discard)
            self._open = (credential, dial.channel(credential.session_address, credential))
        return self._open

    async def close(self) -> None:
        for closing in self._closing:
            closing.cancel()
        if self._open is not None:
            await self._open[1].close(grace=None)
            self._open = None

    async def fetch(self, digest: Digest, destination: Path, n_bytes: int) -> None:
        _, channel = await self._channel()
        await transfer.get_file(artifacts_pb2_grpc.ArtifactsStub(channel), digest, destination, n_bytes)  # type: ignore[no-untyped-call]

    async def put(self, path: Path, digest: Digest) -> None:
        _, channel = await self._channel()
        stub = artifacts_pb2_grpc.ArtifactsStub(channel)  # type: ignore[no-untyped-call]
        if await transfer.missing(stub, [digest]):
            await transfer.put_file(stub, path, digest, self._limiter)

    async def put_patiently(self, path: Path, digest: Digest) -> None:
        """Until it is there, however long the coordinator is away. Raises only what waiting cannot mend."""
        wait_s = 0.2
        while True:
            try:
                return await self.put(path, digest)
            except HiveError as error:
                if not TABLE[error.code].retryable:
                    raise
            await asyncio.sleep(wait_s)
            wait_s = min(5.0, 2 * wait_s)

    async def put_artifact(self, name: str, path: Path) -> Artifact:
        digest = await asyncio.to_thread(digest_file, path)
        await self.put_patiently(path, digest)
        return Artifact(name, digest, path.stat().st_size)

    async def put_folder(self, folder: Path, staging: Path) -> Manifest:
        """A checkpoint's files; linked aside first, because the worker removes old checkpoints on its own."""
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True, mode=0o700)
        try:
            entries = []
            for path in sorted(folder.iterdir()):
                os.link(path, staging / path.name)
            for path in sorted(staging.iterdir()):
                digest = await asyncio.to_thread(digest_file, path)
                entries.append(FileEntry(path.name, digest, path.stat().st_size))
                await self.put_patiently(path, digest)
            return Manifest(tuple(entries))
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    async def bandwidth_bytes_per_s(self) -> float:
        """To the coordinator and back: the median of a few echoes of 1 MiB, both directions one after the other."""
        credential, channel = await self._channel()
        stub: Any = membership_pb2_grpc.MembershipStub(channel)  # type: ignore[no-untyped-call]
        content = os.urandom(_PROBE_BYTES)
        rates = []
        with dial.errors_of(credential.session_address):
            for _ in range(_PROBES):
                if self._limiter is not None:
                    await self._limiter.take(_PROBE_BYTES)
                started = time.perf_counter()
                await stub.Probe(pb.Echo(content=content), timeout=30.0)
                rates.append(2 * _PROBE_BYTES / (time.perf_counter() - started))
        return sorted(rates)[len(rates) // 2]
