"""`hive token`: who may join, as what, how often and until when."""

from __future__ import annotations

import re
from typing import Any

import click

from coordinator.cli import render
from coordinator.cli.session import connected
from protos import limits
from protos.command_line import output_option, say, table, write_document

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def lifetime_s(text: str) -> float:
    """30m, 24h, 7d, 90s."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or float(found[1]) <= 0:
        raise click.BadParameter(f"{text!r} is not a time such as 30m, 24h or 7d")
    return float(found[1]) * _UNITS_S[found[2]]


@click.group()
def token() -> None:
    """Create, list or revoke join tokens."""


@token.command()
@click.option(
    "--role",
    type=click.Choice(["node", "submitter", "admin", "observer"]),
    default="node",
    show_default=True,
    help="What its holder may do: lend a machine, submit jobs, everything, or look.",
)
@click.option(
    "--uses",
    default=1,
    show_default=True,
    type=click.IntRange(0, limits.MAX_COUNT),
    help="Joins it is good for; 0: any number.",
)
@click.option("--lifetime", default="24h", show_default=True, help="How long it is good for: 30m, 24h, 7d.")
@output_option
def create(role: str, uses: int, lifetime: str, as_json: bool) -> None:
    """Make a token and print the command that joins with it. The secret is shown this once."""
    seconds = lifetime_s(lifetime)
    document = connected(lambda client: client.create_token(role, uses, seconds))
    if as_json:
        write_document(document)
        return
    made = document["token"]
    say(f"token {made.get('id')}: role {role}, {uses or 'any number of'} uses, until {render.clock(made['expires_s'])}")
    say("type on the other machine:")
    click.echo(made["join"])


@token.command(name="list")
@click.option("-a", "--all", "everything", is_flag=True, help="Used up, revoked and ended ones too.")
@output_option
def list_tokens(everything: bool, as_json: bool) -> None:
    """List tokens, without their secrets."""
    _print(connected(lambda client: client.tokens(everything)), as_json)


@token.command()
@click.argument("token_id")
@output_option
def revoke(token_id: str, as_json: bool) -> None:
    """Refuse further joins with a token. Who joined with it stays: see hive node remove."""
    _print(connected(lambda client: client.revoke_token(token_id)), as_json)


def _print(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        write_document(document)
        return
    rows = [
        (
            each.get("id"),
            each.get("role"),
            "any" if each.get("uses_left") is None else each["uses_left"],
            render.clock(each.get("expires_s")),
            "yes" if each.get("revoked") else "no",
        )
        for each in document["tokens"]
    ]
    click.echo(table(["TOKEN", "ROLE", "USES LEFT", "UNTIL", "REVOKED"], rows) if rows else "no tokens")
