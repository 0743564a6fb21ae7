"""`hive artifacts`: what a job made, fetched and checked, and the lines of plain torch that load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.session import connected
from coordinator.loading import CODE_FOLDER, load_lines
from protos.command_line import human_bytes, output_option, say, table, write_document
from protos.errors import HiveError, NotFound
from protos.printable import printable

if TYPE_CHECKING:
    from coordinator.client import Client


@click.group()
def artifacts() -> None:
    """List or fetch what a job made."""


@artifacts.command(name="list")
@click.argument("job")
@output_option
def list_artifacts(job: str, as_json: bool) -> None:
    """List what JOB made."""
    made = connected(lambda client: client.show(job))["job"]["artifacts"]
    if as_json:
        write_document({"artifacts": made})
        return
    rows = [(each["name"], human_bytes(each["bytes"]), each["digest"]) for each in made]
    click.echo(table(["NAME", "SIZE", "DIGEST"], rows) if rows else "nothing yet")


@artifacts.command()
@click.argument("job")
@click.argument("outdir", type=click.Path(path_type=Path, file_okay=False))
@output_option
def get(job: str, outdir: Path, as_json: bool) -> None:
    """Fetch what JOB made into OUTDIR and print the lines that load the model."""

    async def work(client: Client) -> tuple[dict[str, Any], list[Path]]:
        document = (await client.show(job))["job"]
        made = document.get("artifacts") or []
        if not made:
            raise NotFound(
                f"job {job} has made nothing yet: it is {document['state']}", f"wait for its end: hive wait {job}"
            )
        try:
            paths = await client.fetch(made, outdir)
            await client.fetch(document.get("code") or [], outdir / CODE_FOLDER)
        except OSError as error:
            raise HiveError(f"{outdir} cannot be written: {error.strerror or error}", "give another folder") from error
        return document, paths

    document, paths = connected(work)
    lines = load_lines(outdir, document.get("model"))
    if as_json:
        found = [dict(each, path=str(path)) for each, path in zip(document["artifacts"], paths, strict=True)]
        write_document({"artifacts": found, "load": lines})
        return
    for path in paths:
        say(f"{path}  {human_bytes(path.stat().st_size)}")
    if lines:
        say("\nload the model with plain torch:")
        click.echo("\n".join(printable(line, "\t") for line in lines))
