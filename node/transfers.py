"""Files to and from the coordinator over one channel, under the owner's upload cap; from a peer first where one has it.

Refuses to send what is not a plain file: user code wrote these folders, and a link could name anything of the owner's.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from protos import dial, transfer
from protos.artifact import Artifact, FileEntry, Manifest, digest_file
from protos.credentials import Credential
from protos.errors import TABLE, ErrorCode, HiveError, SpecError
from protos.gen import artifacts_pb2_grpc, membership_pb2_grpc
from protos.gen import membership_pb2 as pb
from protos.ids import Digest
from protos.token_bucket import TokenBucket

_BURST_S = 0.5
_PROBE_BYTES = 1024 * 1024
_FIRST_PROBE_BYTES = 32 * 1024
_PROBE_S = 0.5  # a line that would take longer for a large probe gets only the small one
_PROBES = 3
_ROUNDS = 3
_OLD_CHANNEL_S = 2 * 3600.0  # longer than a connection lives: no transfer is cut by a renewed certificate
_FULL_S = 120.0  # how long a coordinator may be out of space before a result is given up
_MAX_CHECKPOINT_FILES = 256

FromPeers = Callable[[Digest, Path, int], Awaitable[bool]]


class UploadLimit:
    """protos.transfer.Limiter over a token bucket."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._bucket = TokenBucket(bytes_per_s, bytes_per_s * _BURST_S, time.monotonic())

    async def take(self, n_bytes: int) -> None:
        await asyncio.sleep(self._bucket.take(n_bytes, time.monotonic()))


class Transfers:
    """`credential` is asked before the channel is opened, and again when its certificate was renewed.

    `from_peers(digest, destination, bytes)` is asked before the coordinator is: False when no peer gave the file.
    """

    def __init__(
        self,
        credential: Callable[[], Awaitable[Credential]],
        max_upload_bytes_per_s: float | None,
        from_peers: FromPeers | None = None,
    ) -> None:
        self._credential = credential
        self._from_peers = from_peers
        self.limiter = UploadLimit(max_upload_bytes_per_s) if max_upload_bytes_per_s else None
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
        """What a peer gave in part is not fetched again."""
        if self._from_peers is not None and await self._from_peers(digest, destination, n_bytes):
            return
        _, channel = await self._channel()
        await transfer.get_file(artifacts_pb2_grpc.ArtifactsStub(channel), digest, destination, n_bytes)  # type: ignore[no-untyped-call]

    async def put(self, path: Path, digest: Digest) -> None:
        _, channel = await self._channel()
        stub = artifacts_pb2_grpc.ArtifactsStub(channel)  # type: ignore[no-untyped-call]
        if await transfer.missing(stub, [digest]):
            await transfer.put_file(stub, path, digest, self.limiter)

    async def put_patiently(self, path: Path, digest: Digest) -> None:
        """Until it is there, however long the coordinator is away. Raises what waiting cannot or did not mend."""
        wait_s = 0.2
        full_since: float | None = None
        while True:
            try:
                return await self.put(path, digest)
            except HiveError as error:
                if not TABLE[error.code].retryable:
                    raise
                full = error.code in (ErrorCode.EXHAUSTED, ErrorCode.CORRUPT)
                full_since = (full_since or time.monotonic()) if full else None
                if full_since is not None and time.monotonic() - full_since > _FULL_S:
                    raise
            await asyncio.sleep(wait_s)
            wait_s = min(5.0, 2 * wait_s)

    async def put_artifact(self, name: str, path: Path) -> Artifact:
        _check_plain(path)
        digest = await asyncio.to_thread(digest_file, path)
        await self.put_patiently(path, digest)
        return Artifact(name, digest, path.stat().st_size)

    async def put_folder(self, folder: Path, staging: Path) -> Manifest:
        """A checkpoint's files; linked aside first, because the worker removes old checkpoints on its own.

        Raises SpecError for a folder that holds anything but a few plain files.
        """
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True, mode=0o700)
        try:
            entries = []
            found = sorted(folder.iterdir())
            if len(found) > _MAX_CHECKPOINT_FILES:
                raise SpecError(f"a checkpoint of {len(found)} files is over the limit of {_MAX_CHECKPOINT_FILES}")
            for path in found:
                os.link(path, staging / path.name, follow_symlinks=False)
                _check_plain(staging / path.name)
            for path in sorted(staging.iterdir()):
                digest = await asyncio.to_thread(digest_file, path)
                entries.append(FileEntry(path.name, digest, path.stat().st_size))
                await self.put_patiently(path, digest)
            return Manifest(tuple(entries))
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    async def bandwidth_bytes_per_s(self) -> float:
        """To the coordinator and back, both directions one after the other: small echoes, and on a line (and under an
        upload cap) that carries more in no time the median of a few large ones."""
        credential, channel = await self._channel()
        stub: Any = membership_pb2_grpc.MembershipStub(channel)  # type: ignore[no-untyped-call]
        address = credential.session_address
        await self._echo_s(stub, address, 1)  # opens the connection
        rate = 0.0
        for _ in range(_ROUNDS):  # a machine that stalled for a moment looks like a slow line
            empty_s = min([await self._echo_s(stub, address, 1) for _ in range(_PROBES)])
            small_s = min([await self._echo_s(stub, address, _FIRST_PROBE_BYTES) for _ in range(_PROBES)])
            rate = max(rate, 2 * _FIRST_PROBE_BYTES / max(small_s - empty_s, 1e-4))
            if 2 * _PROBE_BYTES / rate < _PROBE_S:
                break
        slowest = min(rate, self.limiter.bytes_per_s if self.limiter is not None else math.inf)
        if 2 * _PROBE_BYTES / slowest < _PROBE_S:
            large_s = sorted([await self._echo_s(stub, address, _PROBE_BYTES) for _ in range(_PROBES)])
            rate = 2 * _PROBE_BYTES / large_s[_PROBES // 2]
        return rate

    async def _echo_s(self, stub: Any, address: str, n_bytes: int) -> float:
        """Seconds of one round trip of random content."""
        content = os.urandom(n_bytes)
        if self.limiter is not None:
            await self.limiter.take(n_bytes)
        started = time.perf_counter()
        with dial.errors_of(address):
            await stub.Probe(pb.Echo(content=content), timeout=30.0)
        return time.perf_counter() - started


def _check_plain(path: Path) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise SpecError(f"{path.name} is not a plain file: it is not sent", "write results as files, not as links")
