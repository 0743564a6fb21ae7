"""What `hive` and `hive-node` share as programs: lazily imported subcommands, one way out, documents and tables.

Owns: the exit code of every ending (protos.errors.TABLE), the error as one sentence with a hint or as a JSON document,
and that stdout carries data while stderr carries prose. Refuses tracebacks unless HIVE_DEBUG=1. Importing it costs
click and nothing else: `hive --help` must stay below 150 ms.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click

from protos.errors import EXIT_DETACHED, ErrorCode, HiveError
from protos.printable import printable, without_sequences
from protos.version import SCHEMA, SOFTWARE

_LAYOUT = "\n\t"


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are used: `lazy` maps a name to ("module:attribute", help)."""

    def __init__(self, *arguments: Any, lazy: Mapping[str, tuple[str, str]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        module, attribute = self.lazy[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.lazy and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.lazy, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"there is no command {args[0]!r}{meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self.lazy.items()])


def output_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """-o table|json; the command gets `as_json: bool`."""
    return click.option(
        "-o",
        "--output",
        "as_json",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        callback=lambda _context, _parameter, value: value == "json",
        help="A table for people or a versioned JSON document.",
    )(command)


def run(cli: click.Command, name: str, arguments: Sequence[str]) -> int:
    """The exit code of one invocation. A command returns its exit code, or None for 0."""
    as_json = wants_json(arguments)
    try:
        result = cli.main(args=list(arguments), prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else name
        problem = HiveError(error.format_message(), f"see {command} --help", code=ErrorCode.USAGE)
        return show_error(problem, as_json)
    except click.ClickException as error:
        return show_error(HiveError(error.format_message(), code=ErrorCode.USAGE), as_json)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return EXIT_DETACHED
    except HiveError as error:
        _debug_traceback()
        return show_error(error, as_json)
    except BrokenPipeError:  # `hive ps | head`: the reader has enough
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (keeps the interpreter from flushing into the pipe)
        return 0
    except Exception as error:
        _debug_traceback()
        cause: BaseException = error
        while isinstance(cause, BaseExceptionGroup):
            if inner := _first_of_ours(cause):
                return show_error(inner, as_json)
            cause = cause.exceptions[0]  # of a task group: what made it end
        problem = HiveError(
            f"hive failed unexpectedly: {type(cause).__name__}: {cause}",
            "this is a bug in hive; run again with HIVE_DEBUG=1 for the traceback",
        )
        return show_error(problem, as_json)


def _first_of_ours(group: BaseExceptionGroup[BaseException]) -> HiveError | None:
    """The HiveError that ended a task group, however deep it lies."""
    for error in group.exceptions:
        found = _first_of_ours(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, HiveError):
            return found
    return None


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether -o json was typed, known even when the rest of the line cannot be parsed."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=False)
    return any(
        word in ("-ojson", "-o=json", "--output=json") or (word in ("-o", "--output") and after == "json")
        for word, after in pairs
    )


def show_error(error: HiveError, as_json: bool) -> int:
    """One sentence and a hint on stderr, or the error document on stdout; the exit code of the table."""
    if as_json:
        write_document({"error": error.document()})
    else:
        click.echo(f"{paint('error:', 'red', sys.stderr)} {printable(error.message, _LAYOUT)}", err=True)
        for line in error.details:
            click.echo(f"    {printable(line, _LAYOUT)}", err=True)
        if error.hint:
            click.echo(f"  {paint('hint:', 'yellow', sys.stderr)} {printable(error.hint, _LAYOUT)}", err=True)
    return error.exit_code


def _debug_traceback() -> None:
    if os.environ.get("HIVE_DEBUG") == "1":
        import traceback

        click.echo(traceback.format_exc(), err=True)


def write_document(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout, with its schema."""
    write_line({"schema": SCHEMA, **document}, indent=2)


def write_line(document: Mapping[str, Any], indent: int | None = None) -> None:
    """One JSON object on stdout, flushed: a line of a stream when `indent` is None. Non-finite numbers become null."""
    click.echo(json.dumps(_finite(document), indent=indent, allow_nan=False))
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def say(sentence: str) -> None:
    """Prose for a person: stderr, so that it never mixes with data."""
    click.echo(printable(sentence, _LAYOUT), err=True)


def show_output(text: str, stream: Any) -> None:
    """What a program of others printed, as it was; to a terminal without what a terminal would obey."""
    on_terminal = stream.isatty()
    click.echo(without_sequences(text) if on_terminal else text, file=stream, nl=False, color=not on_terminal)


def paint(text: str, colour: str, stream: Any = None) -> str:
    """Coloured on a terminal, plain in a pipe and with NO_COLOR."""
    stream = stream or sys.stdout
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return click.style(text, fg=colour)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns; numbers (as text that starts with a digit) to the right, None as a dash."""
    cells = [["-" if cell is None or cell == "" else printable(str(cell)) for cell in row] for row in rows]
    columns = [[header, *(row[index] for row in cells)] for index, header in enumerate(headers)]
    widths = [max(len(cell) for cell in column) for column in columns]
    numeric = [all(cell[:1].isdigit() or cell == "-" for cell in column[1:]) and bool(cells) for column in columns]
    lines = []
    for row in [list(headers), *cells]:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def human_bytes(size: float | None) -> str | None:
    if size is None:
        return None
    if abs(size) >= 2**80:  # no number of bytes that is: a stranger's file says so
        return "over 1 YiB"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_seconds(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def version_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.version_option(SOFTWARE, message="%(prog)s %(version)s")(command)
