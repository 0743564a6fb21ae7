"""`hive-node status pause resume drain leave bench`: words to the daemon that runs in this HIVE_HOME."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from node import control
from protos.command_line import output_option, table, write_document
from protos.settings import home_folder

_BENCH_DEADLINE_S = 600.0
_DRAIN_DEADLINE_S = 120.0

home_option = click.option("--home", type=click.Path(file_okay=False), help="Whose daemon [default: HIVE_HOME's].")


def home_of(flag: str | None) -> Path:
    return home_folder(flag, os.environ)[0]


def _verb(command: str, summary: str, deadline_s: float) -> click.Command:
    @click.command(name=command, help=summary)
    @home_option
    @output_option
    def verb(home: str | None, as_json: bool) -> None:
        answer = control.ask(home_of(home), command, deadline_s=deadline_s)
        if as_json:
            write_document({key: value for key, value in answer.items() if key != "schema"})
        else:
            click.echo(shown(answer))

    return verb


def shown(answer: dict[str, Any]) -> str:
    """An answer as name: value lines; a list of objects as a table."""
    lines: list[str] = []
    for key, value in _flat(answer):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            headers = list(value[0])
            lines += ["", table([h.upper() for h in headers], [[row.get(h) for h in headers] for row in value])]
        elif isinstance(value, list):
            lines.append(f"{key}: {', '.join(str(part) for part in value) or '-'}")
        else:
            lines.append(f"{key}: {'-' if value in (None, '') else value}")
    return "\n".join(lines) or "done"


def _flat(answer: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested objects as dotted names; the outermost name of a document with one object is left out."""
    answer = {key: value for key, value in answer.items() if key != "schema"}
    if not prefix and len(answer) == 1 and isinstance(only := next(iter(answer.values())), dict):
        answer = only
    found: list[tuple[str, Any]] = []
    for key, value in answer.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found


status = _verb("status", "Say what the daemon here is doing.", 10.0)
pause = _verb("pause", "Stop working now: running tasks write a checkpoint; jobs go on elsewhere or wait.", 30.0)
resume = _verb("resume", "Take work again.", 10.0)
drain = _verb("drain", "Hand over what runs and take nothing new; the daemon stays.", _DRAIN_DEADLINE_S)
leave = _verb("leave", "Leave the cluster for good and end the daemon.", _DRAIN_DEADLINE_S)
bench = _verb("bench", "Measure this machine again, under its caps. Takes about a minute.", _BENCH_DEADLINE_S)
