"""`hive-node config show` and `hive-node install`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from node import config as configuration
from node.cli_control import home_option
from node.cli_start import node_flags
from node.consent import check_user
from node.service_unit import ServiceOptions, service_unit
from protos.command_line import output_option, say, table, write_document
from protos.errors import ErrorCode, HiveError

_UNIT = "hive-node.service"
_SYSTEM_FOLDER = Path("/etc/systemd/system")


@click.group()
def config() -> None:
    """The settings in force."""


@config.command()
@click.option("--sources", is_flag=True, help="Where each value came from: flag, environment, file, default.")
@home_option
@output_option
def show(sources: bool, home: str | None, as_json: bool) -> None:
    """Print the settings that `start` would use here."""
    loaded = configuration.load({"home": home})
    values = configuration.shown(loaded)
    if as_json:
        document: dict[str, Any] = {"config": values}
        if sources:
            document["sources"] = dict(loaded.sources)
        write_document(document)
        return
    if sources:
        say("what a start here and now would use; a running daemon may have been started with other flags")
    rows = [
        [key, _text(value), *([loaded.sources.get(key, "default")] if sources else [])] for key, value in values.items()
    ]
    click.echo(table(["SETTING", "VALUE", *(["FROM"] if sources else [])], rows))


def _text(value: Any) -> Any:
    return ", ".join(str(part) for part in value) if isinstance(value, list) else value


@click.command()
@click.option("--user", "scope", flag_value="user", help="Write a unit of your own account.")
@click.option("--system", "scope", flag_value="system", help="Write a system unit (needs root).")
@click.option("--print", "scope", flag_value="print", default="print", help="Only print it [default].")
@click.option("--run-as", metavar="USER", help="The account a system unit runs as [default: who called sudo].")
@node_flags
def install(scope: str, run_as: str | None, **flags: Any) -> None:
    """Print or write a hardened systemd unit that starts this node with the machine.

    Join once with `hive-node start --token ...` first: the unit holds no token.
    """
    loaded = configuration.load(flags)
    system = scope == "system"
    account = (run_as or os.environ.get("SUDO_USER") or "root") if system else None
    check_user(0 if account == "root" else 1, loaded.allow_root)
    text = service_unit(ServiceOptions(_command(loaded), loaded.home.absolute(), loaded.caps, account))
    if scope == "print":
        click.echo(text, nl=False)
        return
    folder = _SYSTEM_FOLDER if system else Path.home() / ".config" / "systemd" / "user"
    path = folder / _UNIT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise HiveError(
            f"{path} cannot be written: {error.strerror}",
            "a system unit needs root; --user needs none",
            code=ErrorCode.FORBIDDEN,
        ) from None
    which = "" if system else "--user "
    say(f"wrote {path}")
    click.echo(f"systemctl {which}daemon-reload && systemctl {which}enable --now hive-node")
    if not system:
        say("to run while you are not logged in: loginctl enable-linger")


def _command(loaded: configuration.NodeConfig) -> list[str]:
    """`hive-node start` with every setting that was given, but never the token."""
    found = shutil.which("hive-node")
    command = [str(Path(found).absolute())] if found else [sys.executable, "-m", "node.cli"]
    command += ["start", "--home", str(loaded.home.absolute()), "--name", loaded.name]
    given = {
        "--coordinator": loaded.coordinator,
        "--cpus": None if loaded.caps.cpus is None else f"{loaded.caps.cpus:g}",
        "--memory": loaded.caps.memory_bytes,
        "--gpus": loaded.caps.gpus,
        "--max-upload": None if loaded.caps.max_upload_bytes_per_s is None else int(loaded.caps.max_upload_bytes_per_s),
    }
    for flag, value in given.items():
        if value is not None:
            command += [flag, str(value)]
    for network in loaded.trusted_lan:
        command += ["--trusted-lan", network]
    if not loaded.advertise:
        command.append("--no-advertise")
    if loaded.allow_root:
        command.append("--allow-root")
    return command
