"""The TCP connections of this process, as the libraries that made them do not show them: counted, paced, broken.

A connection is a descriptor and its inode: a descriptor that was closed and given to another file is left alone.
Listeners are never touched: gloo ends the process when its listener fails. Linux only.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_MAX_PACING_RATE = 47  # SO_MAX_PACING_RATE, which the socket module does not name
_BYTES_SENT_AT = 200  # tcpi_bytes_sent of struct tcp_info, tcpi_bytes_retrans after it: Linux 4.19 and later


@dataclass(frozen=True, slots=True)
class Connection:
    descriptor: int
    inode: int

    def bytes_sent(self) -> int:
        """Sent over it, what TCP had to repeat counted once; 0 when it is gone or the kernel does not say."""
        info = b""
        with suppress(OSError), self._duplicate() as duplicate:
            info = duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_SENT_AT + 16)
        sent, repeated = info[_BYTES_SENT_AT : _BYTES_SENT_AT + 8], info[_BYTES_SENT_AT + 8 :]
        return int.from_bytes(sent, sys.byteorder) - int.from_bytes(repeated, sys.byteorder)

    def pace(self, bytes_per_s: float) -> None:
        """The kernel sends no faster on it."""
        with suppress(OSError), self._duplicate() as duplicate:
            duplicate.setsockopt(socket.SOL_SOCKET, _MAX_PACING_RATE, int(max(bytes_per_s, 1)))

    def shut_down(self) -> None:
        """Whoever waits on it fails at once, on both sides."""
        with suppress(OSError), self._duplicate() as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _duplicate(self) -> Iterator[socket.socket]:
        if os.fstat(self.descriptor).st_ino != self.inode:
            raise OSError("the descriptor is another file now")
        with socket.socket(fileno=os.dup(self.descriptor)) as duplicate:
            yield duplicate


def open_connections() -> frozenset[Connection]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError, ValueError):
            descriptor = int(entry.name)
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as duplicate:
                inet = duplicate.family in (socket.AF_INET, socket.AF_INET6) and duplicate.type == socket.SOCK_STREAM
                if inet and not duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    found.add(Connection(descriptor, os.fstat(descriptor).st_ino))
    return frozenset(found)
