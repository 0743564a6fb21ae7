"""Many nodes in one process that only say they are alive: real enrolment, real session streams, no worker behind them.

python bench/simulated_nodes.py HOST:PORT TOKEN NODES, until SIGTERM. Speaks the protocol itself, so that a node's own
code is not part of what is measured; a stream that breaks ends the process with an error.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import time
from typing import Any

import grpc.aio

from protos import dial, documents, enrol, version
from protos.capacity import Capacity
from protos.gen import membership_pb2 as pb
from protos.gen import membership_pb2_grpc
from protos.ids import new_spool_id
from protos.states import Activity
from protos.token import Token, parse_token

AT_ONCE = 8  # enrolments
GIB = 2**30
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


async def simulate(address: str, token: Token, name: str, gate: asyncio.Semaphore) -> None:
    """One node, until cancelled."""
    async with gate:
        credential = await enrol.enrol(address, token, name)
    async with dial.channel(credential.session_address, credential) as channel:
        stub: Any = membership_pb2_grpc.MembershipStub(channel)  # type: ignore[no-untyped-call]
        stream = stub.Attach()
        await stream.write(pb.NodeMessage(hello=hello(name)))
        welcome = (await stream.read()).welcome
        async with asyncio.TaskGroup() as group:
            group.create_task(listen(stream, name))
            group.create_task(beat(stream, welcome.heartbeat_s))


async def listen(stream: Any, name: str) -> None:
    while await stream.read() is not _EOF:
        pass
    raise ConnectionError(f"the coordinator closed the stream of {name}")


async def beat(stream: Any, every_s: float) -> None:
    for number in itertools.count(1):
        heartbeat = pb.Heartbeat(number=number, sent_s=time.monotonic(), activity=Activity.PAUSED.value)
        heartbeat.activity_reason = "simulated"
        await stream.write(pb.NodeMessage(heartbeat=heartbeat))
        await asyncio.sleep(every_s)


def hello(name: str) -> pb.Hello:
    capacity = Capacity(
        hostname=name,
        machine_id=name,
        platform="simulated",
        python="3",
        cores=1,
        cores_total=1,
        memory_bytes=GIB,
        memory_total_bytes=GIB,
        disk_free_bytes=GIB,
    )
    return pb.Hello(
        protocol=version.PROTOCOL,
        minimum_protocol=version.MINIMUM_PROTOCOL,
        software=version.SOFTWARE,
        name=name,
        capacity_json=documents.encode(capacity),
        leases_json=b"[]",
        spool_id=new_spool_id(),
        activity=Activity.PAUSED.value,
        activity_reason="simulated",
    )


async def main(address: str, token: Token, nodes: int) -> None:
    gate = asyncio.Semaphore(AT_ONCE)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(simulate(address, token, f"s{number:03}", gate)) for number in range(nodes)]
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: [task.cancel() for task in tasks])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], parse_token(sys.argv[2]), int(sys.argv[3])))
