"""Many nodes in one process that only say they are alive: real enrolment, real sessions, no worker behind them.

python bench/simulated_nodes.py HOST:PORT TOKEN NODES FOLDER, until SIGTERM
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from node.session import Session
from node.spool import Spool
from protos import documents, enrol, version
from protos.capacity import Capacity
from protos.credentials import Credential
from protos.gen import membership_pb2 as pb
from protos.states import Activity
from protos.token import Token, parse_token

AT_ONCE = 8  # enrolments


async def simulate(address: str, token: Token, name: str, folder: Path, gate: asyncio.Semaphore) -> None:
    """One node, until cancelled."""
    async with gate:
        credential = await enrol.enrol(address, token, name)
    capacity = Capacity(name, name, "simulated", "3", cores=1, cores_total=1, memory_bytes=2**30,
                        memory_total_bytes=2**30, disk_free_bytes=2**30)  # fmt: skip
    spool = Spool(folder / name)

    async def current() -> Credential:
        return credential

    def hello() -> pb.Hello:
        return pb.Hello(
            protocol=version.PROTOCOL,
            minimum_protocol=version.MINIMUM_PROTOCOL,
            software=version.SOFTWARE,
            name=name,
            capacity_json=documents.encode(capacity),
            spool_id=spool.spool_id,
            activity=Activity.PAUSED.value,
            activity_reason="simulated",
        )

    def beat() -> pb.Heartbeat:
        return pb.Heartbeat(load=0.0, activity=Activity.PAUSED.value, activity_reason="simulated")

    async def ignore(_: pb.CoordinatorMessage) -> None:
        return None

    await Session(current, hello, ignore, beat, lambda: None, spool).run()


async def main(address: str, token: Token, nodes: int, folder: Path) -> None:
    gate = asyncio.Semaphore(AT_ONCE)
    tasks = [asyncio.create_task(simulate(address, token, f"s{n:03}", folder, gate)) for n in range(nodes)]
    running = asyncio.gather(*tasks)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    await running


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1], parse_token(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
    except asyncio.CancelledError:
        sys.exit(0)
