"""`hive coordinator start`: run the coordinator here, and print how machines join it."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from typing import Any

import click

from coordinator import config as configuration
from coordinator import connect
from protos import credentials
from protos.command_line import output_option, say, write_line
from protos.errors import DeadlineExceeded, HiveError
from protos.version import SCHEMA

_TOKEN_USES = 100
_TOKEN_LIFETIME_S = 24 * 3600.0
_READY_DEADLINE_S = 30.0
_POLL_S = 0.05


@click.group()
def coordinator() -> None:
    """The coordinator: keeps members, jobs and models; decides; never trains."""


@coordinator.command()
@click.option("--host", help="Address to listen on [default: every one].")
@click.option("--port", type=int, help="For joining [default: 7700]; 0 takes a free one.")
@click.option("--session-port", type=int, help="For members, mutual TLS [default: 7701]; 0 takes a free one.")
@click.option("--advertise/--no-advertise", default=None, help="Announce it on the LAN by zeroconf [default: yes].")
@click.option("--home", type=click.Path(file_okay=False), help="Where it keeps everything [default: HIVE_HOME].")
@output_option
def start(as_json: bool, **flags: Any) -> int:
    """Run the coordinator until Ctrl-C. Jobs that run go on without it."""
    asyncio.run(_run(configuration.load(flags), as_json))
    return 0


async def _run(config: configuration.CoordinatorConfig, as_json: bool) -> None:
    from coordinator.app import serve

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    serving = asyncio.create_task(serve(config))
    announcing = asyncio.create_task(_announce(config, time.time(), as_json))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, announcing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if announcing.done() and not serving.done():
            announcing.result()
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
    finally:
        for task in (announcing, stopping, serving):
            task.cancel()
        await asyncio.gather(announcing, stopping, serving, return_exceptions=True)


async def _announce(config: configuration.CoordinatorConfig, since_s: float, as_json: bool) -> None:
    """Once it answers its own administrator: the token, and the command to type on the other machines."""
    client_config = connect.ClientConfig(config.home)
    async with await _answering(client_config, since_s) as client:
        made = (await client.create_token("node", _TOKEN_USES, _TOKEN_LIFETIME_S))["token"]
    credential = credentials.load(client_config.credential_path)
    session_port = int(credential.session_address.rpartition(":")[2])
    port = credential.front_address.rpartition(":")[2]
    host = config.host if config.host not in ("0.0.0.0", "::", "") else lan_address()
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    join = f"hive-node start --coordinator {address} --token {made['token']}"
    if as_json:
        facts = {"address": address, "session_port": session_port, "home": str(config.home)}
        write_line({"schema": SCHEMA, "coordinator": {**facts, "token": made["token"], "join": join}})
        return
    say(f"coordinator at {address} (members: port {session_port}), files in {config.home}")
    say("on each machine that lends itself, type:")
    click.echo(f"  {join}")
    if config.advertise:
        say("  on this LAN, --coordinator may be left out")
    say("then, here: hive nodes, hive submit JOB.yaml --wait. Ctrl-C stops the coordinator; running jobs go on.")


async def _answering(config: connect.ClientConfig, since_s: float) -> Any:
    """A client once this run of the coordinator has written its owner's credential and answers."""
    deadline = time.monotonic() + _READY_DEADLINE_S
    while True:
        try:
            if credentials.load(config.credential_path) and config.credential_path.stat().st_mtime >= since_s - 1:
                client = await connect.connect(config)
                await client.list_jobs(limit=1)
                return client
            last = "no credential was written"
        except HiveError as error:
            last = error.message
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"the coordinator did not answer within {_READY_DEADLINE_S:.0f} s: {last}")
        await asyncio.sleep(_POLL_S)


def lan_address() -> str:
    """The address other machines most likely reach this one at. Asks the routing table; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1: no such host
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
