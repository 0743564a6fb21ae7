"""`hive qtable`: what the choice has learned, to look at, to carry elsewhere, to bring in and to begin anew."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.cli.session import connected
from protos import limits
from protos.command_line import (
    human_seconds,
    output_option,
    paint,
    say,
    table,
    write_document,
    write_line,
)
from protos.errors import ErrorCode, HiveError, NotFound, SpecError

if TYPE_CHECKING:
    from coordinator.client import Client

_SURE, _FAIR = 0.8, 0.5  # confidence, in colours
_LEGEND = (
    "LEARNED: how much longer or shorter a job takes than predicted (visits; rank: of an old table). BEST is for an "
    "average job of the state; a job's own predictions come on top"
)


@click.group()
def qtable() -> None:
    """Look at, move or forget what finished jobs have taught the choice of a strategy."""


@qtable.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Also the cells that no job has visited.")
@output_option
def show(everything: bool, as_json: bool) -> None:
    """Print the table: state, best action, its value, visits and confidence, and every correction learned."""
    document = connected(lambda client: client.qtable("Show"))
    if as_json:
        write_document(document)
        return
    shown = document["qtable"]
    cells = [cell for cell in shown["cells"] if everything or cell["visits"]]
    for line in _heat(cells) if cells else ["nothing was learned yet: the choice follows the predictions"]:
        click.echo(line)
    for line in _about(shown, len(cells) > 0):
        say(line)


def _heat(cells: Sequence[dict[str, Any]]) -> list[str]:
    """A line per cell, coloured by how sure the correction of its best action is."""
    headers = ["PARAMETERS", "ROWS", "NODES", "LATENCY", "BEST", "Q", "N", "CONFIDENCE", "LEARNED"]
    head, *lines = table(headers, [_row(cell) for cell in cells]).splitlines()
    return [head, *(_coloured(line, cell) for line, cell in zip(lines, cells, strict=True))]


def _coloured(line: str, cell: dict[str, Any]) -> str:
    sure = cell["confidence"]
    colour = "green" if sure >= _SURE else "yellow" if sure >= _FAIR else "red"
    return paint(line, colour) if cell["visits"] else line


def _row(cell: dict[str, Any]) -> list[object]:
    best = cell["actions"][cell["best"]]
    learned = [
        f"{action} {_percent(each['residual'])} ({_visits(each)})"
        for action, each in cell["actions"].items()
        if each["n"]
    ]
    jobs = best["n"] - best["ranked"]
    state = cell["state"]
    return [
        state["complexity"],
        state["samples"],
        state["nodes"],
        state["latency"],
        cell["best"],
        f"{best['Q']:+.3f}",
        jobs,
        f"{best['confidence']:.0%}" if jobs else "prior",
        ", ".join(learned),
    ]


def _visits(action: dict[str, Any]) -> str:
    """Visits, and beside them the rank that an old table gave: it weighs like a visit and is none."""
    jobs, ranked = action["n"] - action["ranked"], action["ranked"]
    return ", ".join([str(jobs)] * (jobs > 0) + ["rank"] * (ranked > 0))


def _percent(residual: float) -> str:
    """A residual is ln(predicted / measured): above 0 it took less long than predicted."""
    return f"{round(math.expm1(-residual), 2) + 0.0:+.0%}"


def _about(shown: dict[str, Any], legend: bool) -> list[str]:
    ledger = shown["ledger"]
    share = f"{ledger['share']:.2%} of" if ledger["share"] is not None else "no part yet of"
    said = [_LEGEND] if legend else []
    said += [
        f"exploring has cost {share} {human_seconds(ledger['job_s'])} of job time; the limit is {ledger['limit']:.0%}"
    ]
    said += [
        f"imported: {_amount(each)} from {each['origin'][:22]}, event {each['seq']}"
        for each in shown["contributions"]
        if not each["own"]
    ]
    said += [shown["problem"]] if shown["problem"] else []
    return said


def _amount(contribution: dict[str, Any]) -> str:
    what = "ranks" if contribution["origin"].startswith("ranks-") else "visits"
    states = contribution["cells"]
    return f"{contribution['visits']} {what} in {states} state{'s' if states != 1 else ''}"


@qtable.command()
@click.option(
    "--decisions", is_flag=True, help="Instead: every decision and what came of it, one JSON object per line."
)
def export(decisions: bool) -> None:
    """Print the table as the document that `hive qtable import` takes, here or at another coordinator."""
    if not decisions:
        write_document(connected(lambda client: client.qtable("Export")))
        return

    async def lines(client: Client) -> None:
        async for line in client.decisions():
            write_line(line)

    connected(lines)


@qtable.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@output_option
def import_(file: Path, as_json: bool) -> None:
    """Bring in FILE: another coordinator's export, or the order of the actions in an old q_table.pkl."""
    content = _read(file)
    document = connected(lambda client: client.import_qtable(content, file.name))
    if as_json:
        write_document(document)
        return
    new = document["imported"]["new"]
    for each in new:
        click.echo(f"imported {_amount(each)} from {each['origin'][:22]}")
    if not new:
        click.echo("nothing new: what it holds was imported before, or comes from this coordinator itself")


def _read(file: Path) -> bytes:
    """At most one message: the coordinator says what is wrong with the rest. Never blocks on a pipe."""
    most = limits.MAX_MESSAGE_BYTES - 64 * 1024
    try:
        if not file.is_file():
            what = f"{file} is not a regular file" if file.exists() else f"there is no file {file}"
            raise NotFound(what, "name what hive qtable export printed, or a q_table.pkl")
        with file.open("rb") as opened:
            content = opened.read(most + 1)
    except OSError as error:
        raise NotFound(f"{file} cannot be read: {error.strerror}", "check its permissions") from None
    if len(content) > most:
        message = f"{file} has more than {most} bytes, no table has"
        raise SpecError(message, "name what hive qtable export printed, or a q_table.pkl", code=ErrorCode.DATA_UNUSABLE)
    return content


@qtable.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_option
def reset(yes: bool, as_json: bool) -> None:
    """Forget everything learned and imported: table, ledger and learned speeds. The log keeps what happened."""
    if not yes:
        if not sys.stdin.isatty():
            raise HiveError("nobody is here to confirm it", "say --yes", code=ErrorCode.USAGE)
        click.confirm("forget what all finished jobs have taught?", abort=True, err=True)
    document = connected(lambda client: client.qtable("Reset"))
    if as_json:
        write_document(document)
        return
    for each in document["reset"]["forgotten"]:
        whose = "our own jobs" if each["own"] else each["origin"][:22]
        click.echo(f"forgotten: {_amount(each)} from {whose}")


@qtable.command()
@output_option
def rebuild(as_json: bool) -> None:
    """Read the whole log again, and say whether that gives the table in use."""
    document = connected(lambda client: client.qtable("Rebuild"))
    if as_json:
        write_document(document)
        return
    made = document["rebuilt"]
    found = (
        "equal to the table in use" if made["equal"] else f"not the table in use: {', '.join(made['differs'])} differ"
    )
    click.echo(f"rebuilt from {made['events']} events up to {made['last_event_seq']}: {found}")
    if made["problem"]:
        say(made["problem"])


@qtable.command()
@output_option
def evaluate(as_json: bool) -> None:
    """Say what learning was worth: each job predicted with what was known before it, then measured."""
    document = connected(lambda client: client.qtable("Evaluate"))
    if as_json:
        write_document(document)
        return
    found = document["evaluation"]
    if not found["jobs"]:
        click.echo("no finished job to learn from yet")
        return
    rows = [
        [
            each["action"],
            each["jobs"],
            f"{each['error_without']:.1%} -> {each['error_with']:.1%}",
            f"{each['median_without']:.1%} -> {each['median_with']:.1%}",
            f"{each['bias_without']:+.1%} -> {each['bias_with']:+.1%}",
        ]
        for each in found["errors"]
    ]
    click.echo(table(["ACTION", "JOBS", "MEAN ERROR", "MEDIAN ERROR", "BIAS"], rows))
    click.echo()
    rows = [
        [
            each["policy"],
            each["matched"],
            f"{each['effective']:.1f}",
            "-" if each["ratio"] is None else f"{each['ratio']:.3f}",
        ]
        for each in found["policies"]
    ]
    click.echo(table(["CHOICE", "JOBS", "EFFECTIVE", "TIME"], rows))
    choices = found["choices"]
    click.echo(f"\nlearning changed {choices['changed']} of {choices['decisions']} free choices")
    say("errors are of ln(time), without -> with what was learned before each job; BIAS below 0: it took longer")
    say("TIME: measured over the shortest prediction, of the jobs that such a choice was made for, by 1/propensity")
