"""Log lines of the long-running processes: an event, its fields, one line. Over the standard library's logging.

structlog would do it too, but it imports rich: 8 MiB in a daemon that promises to stay small. Secrets never go in.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

from protos.errors import ErrorCode, HiveError


class Log:
    """`log.info("connected", node=name)`."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: object) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """Like `error`, with the traceback of the exception being handled on the lines below."""
        self._write(logging.ERROR, event, fields, traceback=True)

    def _write(self, level: int, event: str, fields: dict[str, object], traceback: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", line(event, fields), exc_info=traceback)


def line(event: str, fields: dict[str, object]) -> str:
    """`event key=value ...`; a value with blanks or quotes is quoted, a line break never gets through."""
    return " ".join([event, *(f"{key}={_shown(value)}" for key, value in fields.items())])


def _shown(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    plain = bool(text) and text.isprintable() and not any(character in text for character in " \"'=")
    return text if plain else repr(text)


class _Form(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime


def write_to(stream: TextIO, level: str) -> None:
    """Ours from `level` on, everybody else's from warnings on."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise HiveError(f"{level!r} is not a log level", "use debug, info, warning or error", code=ErrorCode.USAGE)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Form())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(number, logging.WARNING))
    logging.getLogger("hive").setLevel(number)


def to_stderr(level: str) -> None:
    write_to(sys.stderr, level)
