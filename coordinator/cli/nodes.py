"""`hive nodes` and `hive node`: the machines, and what their administrator does to one."""

from __future__ import annotations

import click

from coordinator.cli import render
from coordinator.cli.session import connected
from protos.command_line import output_option, write_document


@click.command()
@click.option("--lan", is_flag=True, help="Also machines seen by zeroconf that have not joined, and how they join.")
@output_option
def nodes(lan: bool, as_json: bool) -> None:
    """List the machines: what they have, how fast they measured, how they are."""
    document = connected(lambda client: client.nodes(lan))
    if as_json:
        write_document(document)
        return
    click.echo(render.nodes(document["nodes"]))
    if lan:
        click.echo()
        click.echo(render.lan(document.get("lan") or [], document.get("lan_problem") or ""))


@click.group()
def node() -> None:
    """Change what a machine may be given."""


def _action(action: str, summary: str) -> None:
    @node.command(name=action, help=summary)
    @click.argument("node")
    @output_option
    def command(node: str, as_json: bool) -> None:
        document = connected(lambda client: client.control_node(node, action))
        if as_json:
            write_document(document)
        else:
            click.echo(render.nodes([document["node"]]))


_action("cordon", "Give NODE no new work; what runs goes on.")
_action("uncordon", "Give NODE work again.")
_action("drain", "Move the work of NODE elsewhere, then give it none.")
_action("remove", "Forget NODE and refuse its certificate.")
