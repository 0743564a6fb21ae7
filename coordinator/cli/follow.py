"""`hive wait logs events`: streams that go on across restarts of the coordinator until they are done or Ctrl-C."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli import ending, render
from coordinator.cli.session import connected
from coordinator.follow import EventRecord, Patience
from protos import limits
from protos.command_line import output_option, say, show_output, write_line
from protos.errors import EXIT_DETACHED, HiveError
from protos.printable import printable
from protos.states import TERMINAL_JOB_STATES

if TYPE_CHECKING:
    from coordinator.client import Client


@click.command()
@click.argument("job")
@output_option
def wait(job: str, as_json: bool) -> int:
    """Follow JOB until it ends: 0 succeeded, 100 failed, 103 cancelled; Ctrl-C detaches (130)."""

    async def work(client: Client) -> dict[str, Any]:
        document = await client.show(job)
        if document["job"]["state"] in TERMINAL_JOB_STATES:
            return document
        # what happened until this document need not be told again
        return await ending.wait_with_progress(client, document["job"]["id"], document["job"].get("seq") or 0)

    try:
        document = connected(work)
    except KeyboardInterrupt:
        return ending.detached(job)
    return ending.finish(document, as_json)


@click.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Until the job ends; the exit code is then the job's.")
@click.option("--rank", default=0, show_default=True, type=click.IntRange(0, limits.MAX_COUNT), help="Of which worker.")
@output_option
def logs(job: str, follow: bool, rank: int, as_json: bool) -> int:
    """Print what a worker of JOB printed."""

    async def work(client: Client) -> dict[str, Any] | None:
        async for piece in client.logs(job, rank, follow=follow, patience=Patience(on_outage=_outage)):
            if not piece.text:
                continue
            if as_json:
                write_line({"job_id": job, "rank": rank, "text": piece.text})
            else:
                show_output(piece.text, sys.stdout)
        return await client.show(job) if follow else None

    try:
        document = connected(work)
    except KeyboardInterrupt:
        say(f"\ndetached; job {job} goes on. To follow it again: hive logs {job} -f")
        return EXIT_DETACHED
    return ending.exit_code(document["job"]) if document else 0


@click.command()
@click.option("-w", "--watch", is_flag=True, help="Go on as new ones happen.")
@click.option("--job", default="", help="Only of one job.")
@click.option(
    "--after", "after_seq", default=0, type=click.IntRange(0, limits.MAX_INT64), help="Only those after this number."
)
@output_option
def events(watch: bool, job: str, after_seq: int, as_json: bool) -> int:
    """Print the event log. `--after` the last number seen continues without loss or repetition."""
    last = [after_seq]

    async def work(client: Client) -> None:
        async for event in client.events(job, after_seq, watch, Patience(on_outage=_outage)):
            last[0] = event.seq
            if as_json:
                write_line(event.document())
            else:
                click.echo(_line(event))

    try:
        connected(work)
    except KeyboardInterrupt:
        say(f"\nto continue: hive events -w --after {last[0]}")
        return EXIT_DETACHED
    return 0


def _line(event: EventRecord) -> str:
    details = "  ".join(f"{key}={value}" for key, value in event.payload.items() if value not in (None, "", [], {}))
    subject = event.job_id or event.node_id or ""
    return printable(f"{event.seq}  {render.clock(event.time)}  {event.kind}  {subject}  {details}".rstrip(), "\t")


def _outage(error: HiveError) -> None:
    say(f"{error.message}; trying again")
