"""`hive ps show explain cancel pause resume`: one question, one answer."""

from __future__ import annotations

from typing import Any

import click

from coordinator.cli import plan_view, render
from coordinator.cli.session import connected
from protos.command_line import output_option, write_document


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Finished jobs too.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 10_000), help="At most so many.")
@output_option
def ps(everything: bool, limit: int, as_json: bool) -> None:
    """List jobs."""
    document = connected(lambda client: client.list_jobs(everything, limit))
    if as_json:
        write_document(document)
    else:
        click.echo(render.jobs(document["jobs"]))


@click.command()
@click.argument("job")
@output_option
def show(job: str, as_json: bool) -> None:
    """Show one JOB: state, progress, result."""
    _print_job(connected(lambda client: client.show(job)), as_json)


@click.command()
@click.argument("job")
@output_option
def explain(job: str, as_json: bool) -> None:
    """Say why a JOB was cut the way it was, with what was measured beside each prediction."""
    document = connected(lambda client: client.explain(job))
    if as_json:
        write_document(document)
        return
    if document.get("model"):
        click.echo(render.model(document["model"]))
    if document.get("plan"):
        click.echo(plan_view.plan(document["plan"], document.get("measured"), document.get("names")))
        if seen := plan_view.hindsight(document.get("hindsight") or {}, document.get("names") or {}):
            click.echo(seen)
        if ranks := document.get("ranks"):
            click.echo(plan_view.ranks(ranks))
    else:
        click.echo(plan_view.unplanned(document))


def _control(action: str, summary: str) -> click.Command:
    @click.command(name=action, help=summary)
    @click.argument("job")
    @output_option
    def command(job: str, as_json: bool) -> None:
        _print_job(connected(lambda client: client.control(job, action)), as_json)

    return command


cancel = _control("cancel", "Stop a JOB for good; what it wrote so far stays.")
pause = _control("pause", "Stop a JOB after a checkpoint and free its nodes.")
resume = _control("resume", "Continue a paused JOB from its checkpoint.")


def _print_job(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        write_document(document)
    else:
        click.echo(render.job(document["job"]))
