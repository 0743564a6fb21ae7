"""Blobs on the coordinator's disk, the service over them and the client that talks to it, over a real connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from coordinator.artifacts import ArtifactsService
from coordinator.blobs import BlobStore
from coordinator.interceptors import Guard
from protos import limits, transfer
from protos.artifact import digest_bytes
from protos.errors import ErrorCode, Exhausted, HiveError, NotFound, SpecError
from protos.gen import artifacts_pb2 as pb
from protos.gen import artifacts_pb2_grpc

CHUNK = limits.CHUNK_BYTES
BIG = random.Random(0).randbytes(5 * CHUNK + 17)
DIGEST = digest_bytes(BIG)


async def admit(method: str, context: Any) -> None:
    return None


@contextlib.asynccontextmanager
async def serving(service: ArtifactsService, port: int = 0) -> AsyncIterator[tuple[Any, int]]:
    """A stub of the service on a loopback port; `port` for a server that comes back where it was."""
    server = grpc.aio.server(interceptors=[Guard(admit)], options=[("grpc.so_reuseport", 0)])
    artifacts_pb2_grpc.add_ArtifactsServicer_to_server(service, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{bound}") as channel:
            yield artifacts_pb2_grpc.ArtifactsStub(channel), bound
    finally:
        await server.stop(0)


class Breaking(ArtifactsService):
    """Breaks the first `times` streams in each direction after two chunks, like a link that is cut."""

    def __init__(self, blobs: BlobStore, times: int) -> None:
        super().__init__(blobs)
        self.puts_left = self.gets_left = times
        self.received = self.sent = 0

    async def Put(self, requests: Any, context: Any) -> pb.PutReply:
        breaking, self.puts_left = self.puts_left > 0, self.puts_left - 1

        async def counted() -> AsyncIterator[pb.PutChunk]:
            number = 0
            async for chunk in requests:
                self.received += len(chunk.content)
                yield chunk
                number += bool(chunk.content)
                if breaking and number == 2:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

        return await super().Put(counted(), context)

    async def Get(self, request: Any, context: Any) -> AsyncIterator[pb.GetChunk]:
        breaking, self.gets_left = self.gets_left > 0, self.gets_left - 1
        number = 0
        async for chunk in super().Get(request, context):
            self.sent += len(chunk.content)
            yield chunk
            number += 1
            if breaking and number == 2:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_what_goes_up_comes_down_again(size: int, tmp_path: Path) -> None:
    content = random.Random(size).randbytes(size)
    digest = digest_bytes(content)

    async def main() -> None:
        blobs = BlobStore(tmp_path / "blobs")
        async with serving(ArtifactsService(blobs)) as (stub, _):
            assert await transfer.missing(stub, [digest, DIGEST]) == {digest, DIGEST}
            await transfer.put_file(stub, write(tmp_path / "up", content), digest)
            await transfer.put_file(stub, tmp_path / "up", digest)
            assert await transfer.missing(stub, [digest, DIGEST]) == {DIGEST}
            await transfer.get_file(stub, digest, tmp_path / "down", size)
            assert (tmp_path / "down").read_bytes() == content
        assert blobs.path(digest) == tmp_path / "blobs" / digest[:2] / digest[2:]
        assert blobs.path(digest).read_bytes() == content
        assert list((tmp_path / "blobs" / "partial").iterdir()) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["blobs", "down", "up"]

    asyncio.run(main())


def test_a_broken_transfer_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async def main() -> None:
        service = Breaking(BlobStore(tmp_path / "blobs"), times=2)
        async with serving(service) as (stub, _):
            service.puts_left = 3  # the question where to go on is a call as well
            await transfer.put_file(stub, write(tmp_path / "up", BIG), DIGEST)
            await transfer.get_file(stub, DIGEST, tmp_path / "down", len(BIG))
        assert (tmp_path / "down").read_bytes() == BIG
        assert service.received == len(BIG)
        assert service.sent == len(BIG)

    asyncio.run(main())


def test_a_transfer_goes_on_after_a_restart_of_the_coordinator(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(ArtifactsService(BlobStore(tmp_path / "blobs"))) as (stub, port):
            parts = [
                pb.PutChunk(digest=DIGEST, total_bytes=len(BIG), offset=offset, content=BIG[offset : offset + CHUNK])
                for offset in (0, CHUNK)
            ]
            assert (await stub.Put(iter(parts))).bytes == 2 * CHUNK
        again = Breaking(BlobStore(tmp_path / "blobs"), times=0)
        async with serving(again, port) as (stub, _):
            await transfer.put_file(stub, write(tmp_path / "up", BIG), DIGEST)
        assert again.received == len(BIG) - 2 * CHUNK

    asyncio.run(main())


def test_content_that_is_not_its_digest_never_appears(tmp_path: Path) -> None:
    async def main() -> None:
        blobs = BlobStore(tmp_path / "blobs")
        async with serving(ArtifactsService(blobs)) as (stub, _):
            with pytest.raises(SpecError, match="changed after it was read"):
                await transfer.put_file(stub, write(tmp_path / "up", b"other"), digest_bytes(b"hello"))
            chunk = pb.PutChunk(digest=DIGEST, total_bytes=5, content=b"other")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Put(iter([chunk]))
            assert refused.value.code() is grpc.StatusCode.DATA_LOSS
            assert await transfer.missing(stub, [DIGEST]) == {DIGEST}
        assert list((tmp_path / "blobs" / "partial").iterdir()) == []

    asyncio.run(main())


def test_somebody_elses_wrong_beginning_does_not_spoil_an_upload(tmp_path: Path) -> None:
    async def main() -> None:
        blobs = BlobStore(tmp_path / "blobs")
        async with serving(ArtifactsService(blobs)) as (stub, _):
            wrong = pb.PutChunk(digest=DIGEST, total_bytes=len(BIG), content=bytes(CHUNK))
            assert (await stub.Put(iter([wrong]))).bytes == CHUNK
            await transfer.put_file(stub, write(tmp_path / "up", BIG), DIGEST)
        assert blobs.path(DIGEST).read_bytes() == BIG

    asyncio.run(main())


def test_a_damaged_blob_is_not_taken_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_DELAY_S", 0.0)

    async def main() -> None:
        blobs = BlobStore(tmp_path / "blobs")
        await blobs.put_bytes(b"hello")
        digest = digest_bytes(b"hello")
        blobs.path(digest).write_bytes(b"jello")
        async with serving(ArtifactsService(blobs)) as (stub, _):
            with pytest.raises(HiveError) as refused:
                await transfer.get_file(stub, digest, tmp_path / "down", 5)
            assert refused.value.code is ErrorCode.CORRUPT
            with pytest.raises(HiveError, match="6 were announced"):
                await transfer.get_file(stub, digest, tmp_path / "down", 6)
            with pytest.raises(NotFound):
                await transfer.get_file(stub, DIGEST, tmp_path / "down")
        assert not (tmp_path / "down").exists()

    asyncio.run(main())


def test_a_leftover_longer_than_the_blob_is_thrown_away(tmp_path: Path) -> None:
    async def main() -> None:
        blobs = BlobStore(tmp_path / "blobs")
        digest = await blobs.put_bytes(b"hello")
        write(tmp_path / "down.partial", b"hello, and more")
        async with serving(ArtifactsService(blobs)) as (stub, _):
            await transfer.get_file(stub, digest, tmp_path / "down")
        assert (tmp_path / "down").read_bytes() == b"hello"

    asyncio.run(main())


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 63 + "/"])
def test_what_is_not_a_digest_never_becomes_a_path(digest: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(ArtifactsService(BlobStore(tmp_path / "blobs"))) as (stub, _):
            calls = [
                stub.Missing(pb.MissingRequest(digests=[digest])),
                stub.Put(iter([pb.PutChunk(digest=digest, total_bytes=1, content=b"x")])),
                stub.Get(pb.GetRequest(digest=digest)).read(),
            ]
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())


def test_many_uploads_of_one_file_and_of_many_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        blobs = BlobStore(tmp_path / "blobs", max_uploads=2)
        async with serving(ArtifactsService(blobs)) as (stub, _):
            write(tmp_path / "up", BIG)
            contents = [os.urandom(1000) for _ in range(20)]
            small = [write(tmp_path / f"{n}", content) for n, content in enumerate(contents)]
            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(transfer.put_file(stub, tmp_path / "up", DIGEST))
                for path, content in zip(small, contents, strict=True):
                    group.create_task(transfer.put_file(stub, path, digest_bytes(content)))
        assert blobs.path(DIGEST).read_bytes() == BIG
        assert [blobs.path(digest_bytes(content)).read_bytes() for content in contents] == contents

    asyncio.run(main())


def test_an_upload_without_room_or_turn_is_refused_with_what_to_do(tmp_path: Path) -> None:
    async def main() -> None:
        free = shutil.disk_usage(tmp_path).free
        too_small = BlobStore(tmp_path / "one", max_blob_bytes=10)
        with pytest.raises(Exhausted, match="over the limit of 10"):
            async with too_small.receive(DIGEST, 11):
                pass
        full = BlobStore(tmp_path / "two", margin_bytes=2 * free)
        with pytest.raises(Exhausted, match="do not fit") as refused:
            await full.put_bytes(b"x")
        assert "free space below" in refused.value.hint
        busy = BlobStore(tmp_path / "three", max_uploads=1, wait_s=0.01)
        async with busy.receive(DIGEST, 5):
            with pytest.raises(Exhausted, match="under way"):
                await busy.put_bytes(b"x")
        await busy.put_bytes(b"x")

    asyncio.run(main())


def test_space_promised_to_one_upload_is_not_promised_again(tmp_path: Path) -> None:
    async def main() -> None:
        blobs = BlobStore(tmp_path / "blobs")
        half = shutil.disk_usage(tmp_path).free * 2 // 3
        async with blobs.receive(DIGEST, half):
            with pytest.raises(Exhausted, match="do not fit"):
                async with blobs.receive("0" * 64, half):
                    pass

    asyncio.run(main())


def test_a_silent_sender_gives_its_turn_back(tmp_path: Path) -> None:
    async def main() -> None:
        blobs = BlobStore(tmp_path / "blobs", max_uploads=1)
        async with serving(ArtifactsService(blobs, idle_s=0.05)) as (stub, _):
            call = stub.Put()
            await call.write(pb.PutChunk(digest=DIGEST, total_bytes=len(BIG), content=BIG[:CHUNK]))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await blobs.put_bytes(b"x")

    asyncio.run(main())


def test_a_part_of_a_blob_can_be_read(tmp_path: Path) -> None:
    async def main() -> None:
        blobs = BlobStore(tmp_path / "blobs")
        digest = await blobs.put_bytes(b"0123456789")
        async with serving(ArtifactsService(blobs)) as (stub, _):
            request = pb.GetRequest(digest=digest, offset=3, limit_bytes=4)
            chunks = [chunk async for chunk in stub.Get(request)]
        assert [(c.offset, c.content, c.total_bytes) for c in chunks] == [(3, b"3456", 10)]
        assert await blobs.read_bytes(digest) == b"0123456789"
        with pytest.raises(Exhausted):
            await blobs.read_bytes(digest, 9)
        with pytest.raises(SpecError, match="beyond"):
            await anext(blobs.read(digest, 11))

    asyncio.run(main())


def test_only_old_blobs_that_nothing_refers_to_are_collected(tmp_path: Path) -> None:
    async def main() -> None:
        blobs = BlobStore(tmp_path / "blobs")
        live, dead, asked = [await blobs.put_bytes(content) for content in (b"live", b"dead", b"asked")]
        async with blobs.receive(DIGEST, 100) as upload:
            await upload.write(b"abandoned")
        async with blobs.receive("0" * 64, 100) as upload:
            await upload.write(b"arriving")
            later = time.time() + 3600
            assert blobs.collect([], 7200, later) == blobs.collect([live], 7200, later)  # all are young
            for path in (
                blobs.path(live),
                blobs.path(dead),
                blobs.path(asked),
                *(tmp_path / "blobs/partial").iterdir(),
            ):
                os.utime(path, (1000.0, 1000.0))
            assert await blobs.missing([asked]) == ()
            collected = blobs.collect([live], 60.0, time.time())
            assert (collected.blobs, collected.bytes) == (2, len(b"dead") + len(b"abandoned"))
            await upload.write(b"!")
        assert await blobs.missing([live, dead, asked]) == (dead,)

    asyncio.run(main())


def test_the_limiter_sees_every_byte(tmp_path: Path) -> None:
    class Counting:
        taken = 0

        async def take(self, n_bytes: int) -> None:
            self.taken += n_bytes

    async def main() -> None:
        up, down = Counting(), Counting()
        async with serving(ArtifactsService(BlobStore(tmp_path / "blobs"))) as (stub, _):
            await transfer.put_file(stub, write(tmp_path / "up", BIG), DIGEST, up)
            await transfer.get_file(stub, DIGEST, tmp_path / "down", len(BIG), down)
        assert (up.taken, down.taken) == (len(BIG), len(BIG))

    asyncio.run(main())


def test_a_coordinator_that_is_not_there_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_DELAY_S", 0.0)

    async def main() -> None:
        async with serving(ArtifactsService(BlobStore(tmp_path / "blobs"))) as (_, port):
            pass
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = artifacts_pb2_grpc.ArtifactsStub(channel)
            with pytest.raises(HiveError) as refused:
                await transfer.put_file(stub, write(tmp_path / "up", b"x"), digest_bytes(b"x"))
            assert refused.value.code is ErrorCode.UNREACHABLE

    asyncio.run(main())
