"""Says how far the hashing or sending of something big has come."""

from __future__ import annotations

from collections.abc import Callable

from protos.command_line import human_bytes, say

_BIG_BYTES = 64 * 1024 * 1024  # above this, hashing and sending are announced


def announced(verb: str) -> Callable[[int, int], None]:
    """Says every tenth of something big; nothing for what is over in a moment."""
    last = [-1]

    def announce(done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if total >= _BIG_BYTES and tenth > last[0]:
            last[0] = tenth
            say(f"{verb} files: {human_bytes(done)} of {human_bytes(total)}")

    return announce
