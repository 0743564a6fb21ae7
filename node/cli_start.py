"""`hive-node start`: the flags, the owner's consent, and the daemon until it is told to end."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import Callable
from typing import Any

import click

from node import config as configuration
from node import control
from node.consent import check_user, statement
from protos import log
from protos.command_line import human_bytes, say
from protos.errors import NotFound

_FLAGS = (
    click.option("--coordinator", metavar="HOST:PORT", help="Where it is [default: found on the LAN by zeroconf]."),
    click.option("--name", help="What this machine is called [default: its host name]."),
    click.option("--cpus", metavar="CORES", help="At most so many cores; fractions allowed: 0.25 [default: all]."),
    click.option(
        "--memory", metavar="SIZE", help="At most so much for the workers: 2GiB [default: 80 % of the machine]."
    ),
    click.option("--gpus", metavar="NUMBER", help="At most so many GPUs, or none [default: all]."),
    click.option("--max-upload", metavar="RATE", help="At most so fast: 10MB/s, 80Mbit [default: unbounded]."),
    click.option(
        "--trusted-lan",
        metavar="IFACE|CIDR",
        multiple=True,
        help="A network whose owner trusts it: unencrypted collectives are allowed there. May be repeated.",
    ),
    click.option(
        "--peer/--no-peer",
        default=None,
        help="Let nodes of this cluster reach this one on its trusted networks, by mutual TLS; without, it works alone "
        "[default: yes].",
    ),
    click.option("--peer-port", metavar="PORT", help="Where they reach it [default: any free port]."),
    click.option("--advertise/--no-advertise", default=None, help="Announce it on the LAN by zeroconf [default: yes]."),
    click.option(
        "--allow-root", is_flag=True, default=None, help="Run other people's code as root, if that is who you are."
    ),
    click.option("--home", type=click.Path(file_okay=False), help="Where it keeps everything [default: HIVE_HOME]."),
)


def node_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that become a NodeConfig, but for the token."""
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command


@click.command()
@click.option("--token", metavar="hive1....", help="From `hive coordinator start` or `hive token create`; needed once.")
@node_flags
def start(**flags: Any) -> int:
    """Join a coordinator and work for it until SIGTERM or Ctrl-C, which drain."""
    config = configuration.load(flags)
    if config.token and told_to_join(config):
        return 0
    check_user(os.geteuid(), config.allow_root)
    say(statement(account(), config.coordinator))
    say(f"node {config.name}: {granted(config)}; files in {config.home}")

    log.to_stderr(config.log_level)
    from node.daemon import run

    asyncio.run(run(config))
    return 0


def told_to_join(config: configuration.NodeConfig) -> bool:
    """True when a daemon that waits here without a token has joined with this one: it goes on as it was started."""
    try:
        question = {"token": config.token, "coordinator": config.coordinator}
        answer = control.ask(config.home, "join", question, deadline_s=60.0)
    except NotFound:
        return False
    say(f"the daemon that waits in {config.home} has joined as {answer['node']['name']}; it keeps its own flags")
    return True


def account() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid {os.geteuid()}"


def granted(config: configuration.NodeConfig) -> str:
    """At most 2 cores, 4.0 GiB of memory"""
    caps = config.caps
    parts = [
        None if caps.cpus is None else f"{caps.cpus:g} cores",
        None if caps.memory_bytes is None else f"{human_bytes(caps.memory_bytes)} of memory",
        None if caps.gpus is None else f"{caps.gpus} GPUs",
        None if caps.max_upload_bytes_per_s is None else f"{human_bytes(caps.max_upload_bytes_per_s)}/s of upload",
    ]
    given = ", ".join(part for part in parts if part)
    return f"at most {given}" if given else "the whole machine is lent (see --cpus, --memory)"
