"""`hive plan` and `hive submit`: from a job file to a plan, or to a job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli import ending, plan_view, render
from coordinator.cli.announced import announced
from coordinator.cli.session import connected
from protos.command_line import output_option, say, write_document

if TYPE_CHECKING:
    from coordinator.bundle import Bundle
    from coordinator.client import Client

_job_file = click.argument("job_file", metavar="JOB.yaml", type=click.Path(path_type=Path))
_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value: --set train.epochs=5"
)


@click.command()
@_job_file
@_set_option
@output_option
def plan(job_file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what hive would do with JOB.yaml, without doing it."""
    bundle = _bundle(job_file, overrides)

    async def work(client: Client) -> dict[str, Any]:
        await _upload(client, bundle)
        return await client.plan(bundle)

    document = connected(work)
    if as_json:
        write_document(document)
        return
    if document.get("model"):
        click.echo(render.model(document["model"]))
    click.echo(plan_view.plan(document["plan"], names=document.get("names")))


@click.command()
@_job_file
@_set_option
@click.option("--wait", is_flag=True, help="Follow it until it ends; Ctrl-C detaches.")
@output_option
def submit(job_file: Path, overrides: tuple[str, ...], wait: bool, as_json: bool) -> int:
    """Train what JOB.yaml describes."""
    bundle = _bundle(job_file, overrides)
    accepted: list[str] = []
    output: list[str] = []

    async def work(client: Client) -> dict[str, Any]:
        await _upload(client, bundle)
        document = await client.submit(bundle)
        accepted.append(document["job"]["id"])
        if not wait:
            return document
        say(f"job {accepted[0]} submitted; Ctrl-C detaches, the job goes on")
        document = await ending.wait_with_progress(client, accepted[0])
        output.extend(await ending.last_output(client, document["job"]))
        return document

    try:
        document = connected(work)
    except KeyboardInterrupt:
        if not accepted:
            raise
        return ending.detached(accepted[0])
    if wait:
        return ending.finish(document, as_json, output)
    if as_json:
        write_document(document)
    else:
        click.echo(accepted[0])
        say(f"follow it: hive wait {accepted[0]}")
    return 0


def _bundle(job_file: Path, overrides: tuple[str, ...]) -> Bundle:
    from coordinator.bundle import bundle
    from coordinator.jobfile import read_job

    spec = read_job(job_file, overrides)
    return bundle(spec, job_file.parent, announced("reading"))


async def _upload(client: Client, bundle: Bundle) -> None:
    await client.upload(bundle, announced("sending"))
