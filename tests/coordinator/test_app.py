"""The coordinator whole, in this process: its start, what stays over a restart, and an end within seconds."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coordinator.app import Ready, serve
from coordinator.client import Client
from coordinator.config import CoordinatorConfig
from protos import credentials, dial, documents, enrol
from protos.capacity import Capacity
from protos.errors import ErrorCode, HiveError
from protos.gen import jobs_pb2, jobs_pb2_grpc, membership_pb2_grpc
from protos.gen import membership_pb2 as pb
from protos.token import parse_token

CAPACITY = Capacity("host", "machine", "linux", "3.11", 1.0, 1, 1, 1, 1)
SPEC = b'{"model": {"source": "transformers"}, "data": {"source": "builtin:digits"}}'


@dataclass
class Running:
    ready: Ready
    serving: asyncio.Task[None]

    def client(self) -> Client:
        return Client.of(credentials.load(self.ready.home / "client" / "credential.json"))

    async def end(self) -> float:
        """As Ctrl-C does it; the seconds it took."""
        started = time.monotonic()
        self.serving.cancel()
        await asyncio.wait({self.serving})
        assert self.serving.cancelled()
        return time.monotonic() - started


@asynccontextmanager
async def coordinator(home: Path, port: int = 0, session_port: int = 0) -> AsyncIterator[Running]:
    config = CoordinatorConfig(home, host="127.0.0.1", port=port, session_port=session_port, advertise=False)
    ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(config, ready.set_result))
    await asyncio.wait({ready, serving}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    try:
        yield Running(ready.result(), serving)
    finally:
        serving.cancel()
        await asyncio.wait({serving})


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await body()

    asyncio.run(main())


def test_ctrl_c_ends_it_within_seconds_whoever_is_listening(tmp_path: Path) -> None:
    async def body() -> None:
        async with coordinator(tmp_path) as made, made.client() as client:
            node = await enrol.enrol(made.ready.address, parse_token(made.ready.token), "box")
            line = dial.channel(node.session_address, node)
            member: Any = membership_pb2_grpc.MembershipStub(line)  # type: ignore[no-untyped-call]
            stream = member.Attach()
            hello = pb.Hello(protocol=1, minimum_protocol=1, name="box", capacity_json=documents.encode(CAPACITY))
            await stream.write(pb.NodeMessage(hello=hello))
            assert (await stream.read()).WhichOneof("body") == "welcome"
            owner = credentials.load(tmp_path / "client" / "credential.json")
            jobs_line = dial.channel(owner.session_address, owner)
            jobs: Any = jobs_pb2_grpc.JobsStub(jobs_line)  # type: ignore[no-untyped-call]
            submitted = json.loads((await jobs.Submit(jobs_pb2.SubmitRequest(spec_json=SPEC))).json)["job"]
            followers = [jobs.Events(jobs_pb2.EventsRequest(follow=True)) for _ in range(3)]
            followers += [jobs.Logs(jobs_pb2.LogsRequest(job_id=submitted["id"], follow=True))]
            for follower in followers[:3]:
                assert (await follower.read()).seq == 1
            planning = asyncio.create_task(client.nodes())
            await planning
            assert await made.end() < 3.0
            for call in (stream, *followers):
                call.cancel()
            await line.close()
            await jobs_line.close()

    run(body)


def test_a_restart_keeps_members_jobs_and_the_printed_token(tmp_path: Path) -> None:
    async def body() -> None:
        async with coordinator(tmp_path) as first:
            node = await enrol.enrol(first.ready.address, parse_token(first.ready.token), "box")
            async with first.client() as client:
                before = await client.tokens(everything=True)
            await first.end()
        async with coordinator(tmp_path) as second:
            assert second.ready.token == first.ready.token
            moved = await enrol.rejoin(second.ready.address, node)  # at a new address, by its key alone
            assert moved.id == node.id
            async with second.client() as client:
                assert (await client.tokens(everything=True)) == before
                assert (await client.doctor())["checks"][0]["ok"]

    run(body)


def test_a_port_that_is_taken_is_one_sentence_and_leaves_the_home_free(tmp_path: Path) -> None:
    async def body() -> None:
        async with coordinator(tmp_path / "one") as made:
            port = int(made.ready.address.rpartition(":")[2])
            for ports in ({"port": port}, {"session_port": port}):
                with pytest.raises(HiveError, match="taken by another program") as taken:
                    async with coordinator(tmp_path / "two", **ports):
                        pass
                assert taken.value.code is ErrorCode.PORT_TAKEN
            with pytest.raises(HiveError) as running:
                async with coordinator(tmp_path / "one"):
                    pass
            assert running.value.code is ErrorCode.CONFLICT
            async with coordinator(tmp_path / "two") as second, second.client() as client:
                assert (await client.nodes())["nodes"] == []

    run(body)
