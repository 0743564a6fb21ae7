"""The bytes a pickle is read from: nothing is taken before it is known to be there and to be little.

Long bytes and texts are stepped over and become a `Blob`; what is kept is counted, so that no file can fill the memory.
"""

from __future__ import annotations

import io
from typing import BinaryIO

from coordinator.identify.pickle_values import Blob

MAX_KEPT_BYTES = 128 * 1024 * 1024
LONG_BYTES = 64 * 1024
_BLOCK_BYTES = 1024 * 1024
_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that start no character


class TooMuch(ValueError):
    """The pickle wants more kept than any model's needs."""


class Source:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._kept_bytes = 0
        self._end = _end_of(file)

    def code(self) -> bytes:
        """The next opcode."""
        return self._file.read(1)

    def read(self, count: int) -> bytes:
        """Exactly so many bytes, to be kept. Raises EOFError, TooMuch."""
        self._keep(count)
        data = self._file.read(count)
        if len(data) != count:
            raise EOFError("cut short")
        return data

    def readline(self) -> bytes:
        line = self._file.readline(MAX_KEPT_BYTES - self._kept_bytes + 1)
        self._keep(len(line))
        return line

    def skip(self, count: int) -> None:
        """Steps over so many bytes; raises EOFError when they are not there."""
        if self._end is not None:
            target = self._file.tell() + count
            if target > self._end:
                raise EOFError("cut short")
            self._file.seek(target)
            return
        while count:
            data = self._file.read(min(count, _BLOCK_BYTES))
            if not data:
                raise EOFError("cut short")
            count -= len(data)

    def bytes_of(self, count: int) -> bytes | Blob:
        if count <= LONG_BYTES:
            return self.read(count)
        self.skip(count)
        return Blob(count)

    def text_of(self, count: int) -> str | Blob:
        """UTF-8 text that is so many bytes long."""
        if count <= LONG_BYTES:
            return self.read(count).decode("utf-8", "surrogatepass")
        characters = 0
        while count:
            data = self._file.read(min(count, _BLOCK_BYTES))
            if not data:
                raise EOFError("cut short")
            count -= len(data)
            characters += len(data.translate(None, _CONTINUATION))
        return Blob(characters)

    def _keep(self, count: int) -> None:
        self._kept_bytes += count
        if self._kept_bytes > MAX_KEPT_BYTES:
            raise TooMuch(f"more than {MAX_KEPT_BYTES} bytes of names and numbers")


def _end_of(file: BinaryIO) -> int | None:
    """Where a file that can be stepped about in ends; None for a stream that is unpacked on the way."""
    if not file.seekable():
        return None
    here = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(here)
    return end
