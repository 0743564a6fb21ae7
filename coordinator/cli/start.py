"""`hive coordinator start`: run the coordinator here, and print how machines join it."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import click

from coordinator import config as configuration
from protos import log
from protos.command_line import output_option, say, write_line
from protos.version import SCHEMA

if TYPE_CHECKING:
    from coordinator.app import Ready


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

    log.to_stderr(config.log_level)
    serving = asyncio.create_task(serve(config, lambda ready: _announce(ready, config.advertise, as_json)))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    try:
        await serving
    except asyncio.CancelledError:
        say("the coordinator has ended; jobs that run go on and report when it is back")


def _announce(ready: Ready, advertised: bool, as_json: bool) -> None:
    """The command to type on the other machines: a document on one line, or words."""
    facts = {"address": ready.address, "session_port": ready.session_port, "home": str(ready.home)}
    if as_json:
        write_line({"schema": SCHEMA, "coordinator": {**facts, "token": ready.token, "join": ready.join}})
        return
    say(f"coordinator at {ready.address} (members: port {ready.session_port}), files in {ready.home}")
    say("on each machine that lends itself, type:")
    click.echo(f"  {ready.join}")
    if advertised:
        say("  on this LAN, --coordinator may be left out")
    say("then, here: hive nodes, hive submit JOB.yaml --wait. Ctrl-C ends the coordinator; running jobs go on.")
