"""`hive models identify`: what a model file or directory is, without running it.

The bytes are read by a confined child of this process, so it works without a coordinator. What only building the model
tells a node is asked, where one can be reached; where none can, that is no error but a hint.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli import model_view
from coordinator.cli.announced import announced
from coordinator.cli.session import connected
from protos.command_line import output_option, write_document
from protos.errors import ErrorCode, HiveError

if TYPE_CHECKING:
    from coordinator.client import Client
    from coordinator.model_look import Subject
    from protos.model import ModelProfile

_NOBODY = (
    ErrorCode.UNREACHABLE, ErrorCode.VERSION_MISMATCH, ErrorCode.NO_PLACEMENT, ErrorCode.UNAUTHENTICATED,
    ErrorCode.FORBIDDEN, ErrorCode.TIMEOUT,
)  # fmt: skip


@click.group()
def models() -> None:
    """Find out what a model is."""


@models.command()
@click.argument("path", metavar="PATH")
@click.option("--layers", type=click.IntRange(0), default=20, show_default=True, help="So many in the table.")
@click.option("--local", is_flag=True, help="What the bytes tell, without asking a node.")
@output_option
def identify(path: str, layers: int, local: bool, as_json: bool) -> None:
    """Say what the model at PATH is, without running it: a file, a directory, or FILE.py:FUNCTION."""
    from coordinator import model_look
    from protos import documents

    subject = model_look.Subject.of(path)
    profile = asyncio.run(model_look.at_bytes(subject))
    seen_by, hint = "bytes", model_look.what_a_node_adds(subject, profile)
    if hint and not local:
        try:
            profile = model_look.joined(profile, _at_node(subject))
            seen_by, hint = "node", ""
        except HiveError as error:
            if error.code not in _NOBODY and "parameters" in profile.unknown:
                raise  # the model cannot be built, and nothing else says what it is
            hint = f"{hint}. None was asked: {error.message}"
    row: dict[str, Any] = {**documents.plain(profile), "source": path, "seen_by": seen_by, "hint": hint}
    if as_json:
        write_document({"model": row})
    else:
        click.echo(model_view.model(row, layers))


def _at_node(subject: Subject) -> ModelProfile:
    """Raises HiveError: of those in _NOBODY, that no node could say."""
    from coordinator.model_look import travelling
    from protos import documents
    from protos.model import ModelProfile

    async def work(client: Client) -> dict[str, Any]:
        bundle = travelling(subject, announced("reading"))
        await client.upload(bundle, announced("sending"))
        return await client.identify(bundle)

    shown = connected(work)["model"]
    return documents.decode(ModelProfile, json.dumps(shown))
