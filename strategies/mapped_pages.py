"""Pages of files that are mapped into this process: let go of when they have been read.

Only the system knows which memory is a file's; anywhere else letting go would lose what was written, so it is asked.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path


def let_go(address: int, size_bytes: int) -> bool:
    """The whole pages inside [address, address + size_bytes) leave memory; read again, they come from the file.

    For memory that was only read. Does nothing, and says so, where it is not all of one file.
    """
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop <= start or not _of_a_file(start, stop):
        return False
    with suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        status: int = advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
        return status == 0
    return False


def _of_a_file(start: int, stop: int) -> bool:
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            bounds, _, _, _, _, *path = line.split(maxsplit=5)
            first, last = (int(each, 16) for each in bounds.split("-"))
            if first <= start < last:
                return stop <= last and bool(path) and path[0].startswith("/")
    return False
