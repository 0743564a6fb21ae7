"""The C library's heap: makes large blocks go back to the system when they are freed.

glibc raises its threshold for separate mappings with every large block that is freed, and a heap only shrinks from its
end: a process that gathers and drops layer after layer would keep several times what it uses.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

LARGE_BYTES = 256 * 1024
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h; setting it also stops its growth


def return_large_blocks(at_least_bytes: int = LARGE_BYTES) -> None:
    """For this process, from now on. Each such block costs fresh pages. Does nothing where the C library has no such
    setting."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, at_least_bytes)
