"""`hive doctor`: this machine, the coordinator, and the way between, each with what to do when it is wrong."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from typing import Any

import click

from coordinator import connect
from coordinator.cli import render
from protos.command_line import human_bytes, output_option, write_document
from protos.errors import TABLE, ErrorCode, HiveError

_ENOUGH_DISK_BYTES = 1024**3


@click.command()
@output_option
def doctor(as_json: bool) -> int:
    """Check this machine, the coordinator and the way between."""
    checks, failure = asyncio.run(_checks())
    if as_json:
        write_document({"checks": checks})
    else:
        click.echo(render.checks(checks))
    if failure is not None:
        return failure.exit_code
    return 0 if all(check["ok"] for check in checks) else TABLE[ErrorCode.UNEXPECTED].exit_code


async def _checks() -> tuple[list[dict[str, Any]], HiveError | None]:
    """What was checked here and there; with the error that kept the coordinator from answering."""
    config = connect.load()
    checks = [_python(), _home(config), await _reader()]
    try:
        credential = await connect.credential(config)
        left_h = (credential.expires_unix_s - time.time()) / 3600
        sentence = f"role {credential.role}, good for {left_h:.1f} h"
        checks.append(_check("credential", True, sentence))
        async with await connect.connect(config) as client:
            started = time.perf_counter()
            answer = await client.doctor()
            took_ms = 1000 * (time.perf_counter() - started)
        checks.append(_check("coordinator", True, f"{credential.session_address} answered in {took_ms:.0f} ms"))
    except HiveError as error:
        checks.append(_check("coordinator", False, error.message, error.hint))
        return checks, error
    return [*checks, *answer["checks"]], None


def _check(name: str, ok: bool, message: str, hint: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "message": message, "hint": hint}


def _python() -> dict[str, Any]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return _check("python", sys.version_info >= (3, 11), version, "hive needs Python 3.11 or newer")


async def _reader() -> dict[str, Any]:
    """What keeps a hostile model file from doing harm while it is identified."""
    from coordinator.identify.confine import bounds_held

    held = await bounds_held()
    missing = [name for name, holds in held.items() if not holds]
    said = f"their reader has {', '.join(name for name, holds in held.items() if holds) or 'nothing'}"
    lacking = f"; not on this machine: {', '.join(missing)}" if missing else ""
    return _check("model files", any(held.values()), said + lacking, "is hive installed completely?")


def _home(config: connect.ClientConfig) -> dict[str, Any]:
    folder = config.home
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return _check("HIVE_HOME", False, f"{config.home} cannot be written", "set HIVE_HOME to a folder of yours")
    free = shutil.disk_usage(folder).free
    return _check(
        "HIVE_HOME",
        free >= _ENOUGH_DISK_BYTES,
        f"{config.home}, {human_bytes(free)} free",
        "free some space, or move it with HIVE_HOME",
    )
