"""Files to the coordinator's real artifact service over TLS on loopback; what is never sent; probing a slow line."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coordinator import listeners
from coordinator.artifacts import ArtifactsService
from coordinator.authority import Authority, open_authority
from coordinator.blobs import BlobStore
from node.transfers import Transfers
from protos.artifact import digest_bytes
from protos.credentials import Credential
from protos.errors import SpecError
from protos.gen import artifacts_pb2_grpc, membership_pb2, membership_pb2_grpc
from protos.token import Role


class Echo(membership_pb2_grpc.MembershipServicer):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    async def Probe(self, request: membership_pb2.Echo, context: Any) -> membership_pb2.Echo:
        self.sizes.append(len(request.content))
        return request


class Artifacts(ArtifactsService):
    """The real one, which says when the first upload has begun."""

    def __init__(self, blobs: BlobStore) -> None:
        super().__init__(blobs)
        self.begun = asyncio.Event()

    async def Put(self, requests: Any, context: Any) -> Any:
        self.begun.set()
        return await super().Put(requests, context)


@dataclass
class House:
    authority: Authority
    blobs: BlobStore
    echo: Echo
    artifacts: Artifacts
    address: str = ""

    def credential(self) -> Credential:
        return self.authority.credential(Role.NODE, "n", self.address, self.address, time.time())


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[House]:
    async def anyone(member_id: str) -> bool:
        return True

    blobs = BlobStore(folder / "blobs")
    made = House(open_authority(folder / "coordinator"), blobs, Echo(), Artifacts(blobs))
    server = listeners.session_server(anyone)
    artifacts_pb2_grpc.add_ArtifactsServicer_to_server(made.artifacts, server)  # type: ignore[no-untyped-call]
    membership_pb2_grpc.add_MembershipServicer_to_server(made.echo, server)  # type: ignore[no-untyped-call]
    made.address = f"127.0.0.1:{listeners.bind_session(server, made.authority, '127.0.0.1', 0)}"
    await server.start()
    try:
        yield made
    finally:
        await server.stop(0)


def run(
    tmp_path: Path, body: Callable[[House, Transfers], Awaitable[None]], max_upload_bytes_per_s: float | None = None
) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), house(tmp_path) as made:
            held = made.credential()

            async def credential() -> Credential:
                return held

            transfers = Transfers(credential, max_upload_bytes_per_s)
            try:
                await body(made, transfers)
            finally:
                await transfers.close()

    asyncio.run(main())


def checkpoint(folder: Path) -> Path:
    made = folder / "checkpoints" / "step-00000005"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "state.json").write_bytes(b"{}")
    return made


def test_a_checkpoint_arrives_although_its_worker_removes_it_meanwhile(tmp_path: Path) -> None:
    async def body(made: House, transfers: Transfers) -> None:
        folder = checkpoint(tmp_path)
        sending = asyncio.create_task(transfers.put_folder(folder, tmp_path / "staging"))
        await made.artifacts.begun.wait()
        for path in folder.iterdir():
            path.unlink()
        manifest = await sending
        assert [entry.path for entry in manifest.files] == ["model.safetensors", "state.json"]
        assert await made.blobs.missing([entry.digest for entry in manifest.files]) == ()
        assert not (tmp_path / "staging").exists()

    run(tmp_path, body)


@pytest.mark.parametrize("what", ["link", "link to a folder", "folder", "pipe"])
def test_nothing_but_plain_files_leaves_this_machine(tmp_path: Path, what: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"the owner's own")
    folder = checkpoint(tmp_path)
    match what:
        case "link":
            (folder / "z").symlink_to(secret)
        case "link to a folder":
            (folder / "z").symlink_to(tmp_path)
        case "folder":
            (folder / "z").mkdir()
        case "pipe":
            os.mkfifo(folder / "z")

    async def body(made: House, transfers: Transfers) -> None:
        with pytest.raises((SpecError, OSError)):
            await transfers.put_folder(folder, tmp_path / "staging")
        assert await made.blobs.missing([digest_bytes(b"the owner's own")])
        assert not (tmp_path / "staging").exists()
        if what != "folder":
            with pytest.raises(SpecError, match="not a plain file"):
                await transfers.put_artifact("z", folder / "z")

    run(tmp_path, body)


def test_a_fast_line_is_measured_with_large_echoes_and_a_capped_one_with_a_small(tmp_path: Path) -> None:
    async def free(made: House, transfers: Transfers) -> None:
        assert await transfers.bandwidth_bytes_per_s() > 0
        assert max(made.echo.sizes) == 1024 * 1024

    async def capped(made: House, transfers: Transfers) -> None:
        assert await transfers.bandwidth_bytes_per_s() > 0
        assert max(made.echo.sizes) == 32 * 1024 and sum(made.echo.sizes) < 100 * 1024

    run(tmp_path / "free", free)
    run(tmp_path / "capped", capped, 100_000.0)


def test_a_renewed_certificate_is_used_and_what_is_under_way_is_not_cut(tmp_path: Path) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), house(tmp_path) as made:
            held = [made.credential()]

            async def credential() -> Credential:
                return held[-1]

            transfers = Transfers(credential, 500_000.0)
            large, small = tmp_path / "large", tmp_path / "small"
            large.write_bytes(os.urandom(1_000_000))
            small.write_bytes(b"small")
            sending = asyncio.create_task(transfers.put_artifact("large", large))
            await made.artifacts.begun.wait()
            held.append(made.credential())
            await transfers.put_artifact("small", small)
            artifact = await sending
            assert await made.blobs.missing([artifact.digest]) == ()
            await transfers.close()

    asyncio.run(main())
