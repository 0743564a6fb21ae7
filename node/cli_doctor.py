"""`hive-node doctor`: this machine's checks, and the daemon's own where one runs."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from node import config as configuration
from node import control
from node.cli_control import home_of, home_option
from protos.command_line import human_bytes, output_option, paint, write_document
from protos.errors import TABLE, ErrorCode, HiveError, NotFound

_ENOUGH_DISK_BYTES = 2 * 1024**3


@click.command()
@home_option
@output_option
def doctor(home: str | None, as_json: bool) -> int:
    """Check this machine and say which caps are enforced how."""
    folder = home_of(home)
    checks = [_python(), _torch(), _disk(folder)]
    try:
        checks += control.ask(folder, "doctor", deadline_s=30.0)["checks"]
    except NotFound as error:
        # a daemon that runs has its owner's word about its user already
        checks += [_user(home), _check("daemon", False, error.message, error.hint), _cpu_cap(home)]
    if as_json:
        write_document({"checks": checks})
    else:
        for check in checks:
            mark = paint("ok  ", "green") if check["ok"] else paint("fail", "red")
            click.echo(f"{mark}  {check['name']}: {check['message']}")
            if check.get("hint") and not check["ok"]:
                click.echo(f"      hint: {check['hint']}")
    return 0 if all(check["ok"] for check in checks) else TABLE[ErrorCode.UNEXPECTED].exit_code


def _check(name: str, ok: bool, message: str, hint: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "message": message, "hint": hint}


def _python() -> dict[str, Any]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return _check("python", sys.version_info >= (3, 11), version, "hive needs Python 3.11 or newer")


def _torch() -> dict[str, Any]:
    missing = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
    message = f"{', '.join(missing)} missing" if missing else "torch and safetensors are installed"
    return _check("workers", not missing, message, "workers need them: install hive with its node extra")


def _user(home: str | None) -> dict[str, Any]:
    if os.geteuid() == 0 and not configuration.load({"home": home}).allow_root:
        return _check(
            "user", False, "you are root: jobs would run as root", "start as an ordinary user, or --allow-root"
        )
    return _check("user", True, f"jobs run as uid {os.geteuid()}")


def _disk(home: Path) -> dict[str, Any]:
    folder = home
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return _check("HIVE_HOME", False, f"{home} cannot be written", "set HIVE_HOME to a folder of yours")
    free = shutil.disk_usage(folder).free
    hint = "free some space, or move it with HIVE_HOME"
    return _check("HIVE_HOME", free >= _ENOUGH_DISK_BYTES, f"{home}, {human_bytes(free)} free", hint)


def _cpu_cap(home: str | None) -> dict[str, Any]:
    """Which mechanism a daemon started now would use for its CPU cap."""
    from node import cpu_limit

    async def tried() -> tuple[str, str]:
        cpus = configuration.load({"home": home}).caps.cpus
        limit = await cpu_limit.choose(cpus, float(len(os.sched_getaffinity(0))))
        await limit.close()
        return limit.mechanism, limit.reason

    try:
        mechanism, reason = asyncio.run(tried())
    except HiveError as error:
        return _check("cpu cap", False, error.message, error.hint)
    return _check("cpu cap", True, f"{mechanism}: {reason}")
