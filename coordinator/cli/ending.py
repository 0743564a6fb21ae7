"""Waiting for a job in a terminal: progress, how it ended, and the exit code that says so."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli import render
from coordinator.cli.progress_view import ProgressView
from coordinator.follow import Patience
from protos.command_line import say, show_output, write_document
from protos.errors import EXIT_DETACHED, TABLE, ErrorCode, HiveError

if TYPE_CHECKING:
    from coordinator.client import Client

_LAST_LINES = 20
# A job that ended with one of these never trained: the exit code is the one a refused submit would have had.
_NEVER_TRAINED = (ErrorCode.MODEL_UNUSABLE, ErrorCode.DATA_UNUSABLE, ErrorCode.NO_PLACEMENT)


def exit_code(job: Mapping[str, Any]) -> int:
    """0 succeeded, 103 cancelled, 100 failed; 3 or 7 when model, data or machines were refused."""
    match job.get("state"):
        case "SUCCEEDED":
            return 0
        case "CANCELLED":
            return TABLE[ErrorCode.CANCELLED].exit_code
        case "FAILED":
            for code in _NEVER_TRAINED:
                if job.get("reason") == code.value:
                    return TABLE[code].exit_code
            return TABLE[ErrorCode.JOB_FAILED].exit_code
    return TABLE[ErrorCode.UNEXPECTED].exit_code


async def wait_with_progress(client: Client, job_id: str, after_seq: int = 0) -> dict[str, Any]:
    """The job's document once it has ended; progress goes to stderr, across restarts of the coordinator."""
    with ProgressView(job_id, after_seq) as view:
        patience = Patience(on_outage=lambda error: view.say(f"{error.message}; the job goes on, trying again"))
        return await client.wait(job_id, view.take, after_seq, patience)


async def last_output(client: Client, job: Mapping[str, Any], rank: int = 0) -> list[str]:
    """The last lines that a worker of a job that succeeded printed; its own, so nothing of hive's is among them."""
    lines: deque[str] = deque(maxlen=_LAST_LINES + 1)  # one more: a piece need not end at the end of a line
    if job.get("state") == "SUCCEEDED":
        with contextlib.suppress(HiveError):  # the job is done: what it printed is a courtesy
            async for piece in client.logs(job["id"], rank):
                begun = lines.pop() if lines else ""
                lines.extend((begun + piece.text).split("\n"))
    return [line for line in lines if line.strip()][-_LAST_LINES:]


def detached(job_id: str) -> int:
    """What Ctrl-C means while waiting: the job goes on."""
    say(f"\ndetached; job {job_id} goes on. To follow it again: hive wait {job_id}; to stop it: hive cancel {job_id}")
    return EXIT_DETACHED


def finish(document: Mapping[str, Any], as_json: bool, output: Sequence[str] = ()) -> int:
    """Print the end of a job; its exit code. `output`: what its worker printed last, as it was."""
    job = document["job"]
    for line in output:
        show_output(line + "\n", sys.stderr)
    if as_json:
        write_document(document)
    else:
        click.echo(render.job(job))
        if job.get("state") == "SUCCEEDED":
            say(f"fetch the model: hive artifacts get {job['id']} OUTDIR")
        elif job.get("state") == "FAILED":
            say(f"what the workers printed: hive logs {job['id']}")
    return exit_code(job)
