"""Bytes a worker printed to lines of bounded length. Pure.

A progress bar that rewrites its line with carriage returns keeps only its last state. What is over the bound of a line
is dropped and its size said.
"""

from __future__ import annotations

from protos import limits


class LineSplitter:
    def __init__(self, limit_bytes: int = limits.MAX_LOG_LINE_BYTES) -> None:
        self._limit = limit_bytes
        self._line = bytearray()
        self._cut = 0
        self._returned = False  # the last byte was a carriage return: "\r\n" ends a line, "\rx" rewrites it

    def feed(self, content: bytes) -> list[str]:
        """The lines completed by these bytes."""
        *complete, rest = content.split(b"\n")
        lines = []
        for part in complete:
            self._append(part)
            lines.append(self._take())
        self._append(rest)
        return lines

    def finish(self) -> list[str]:
        """The last line, when it has no newline."""
        return [self._take()] if self._line or self._cut else []

    def _append(self, part: bytes) -> None:
        for index, piece in enumerate(part.split(b"\r")):
            self._returned = self._returned or index > 0
            if not piece:
                continue
            if self._returned:
                self._line.clear()
                self._cut = 0
                self._returned = False
            room = self._limit - len(self._line)
            self._line += piece[:room]
            self._cut += max(0, len(piece) - room)

    def _take(self) -> str:
        text = self._line.decode("utf-8", "replace")
        if self._cut:
            text += f" ... ({self._cut} bytes cut)"
        self._line.clear()
        self._cut = 0
        self._returned = False
        return text
