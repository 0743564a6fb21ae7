"""The C library's heap: makes large blocks go back to the system when they are freed.

glibc raises its threshold for separate mappings with every large block that is freed, and a heap only shrinks from its
end: a process that gathers and drops layer after layer would keep several times what it uses.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

LARGE_BYTES = 256 * 1024
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h; setting it also stops its growth


KEPT_TIMES = 5  # of the weights that pass through it, at worst, in a heap that keeps what was freed
USUALLY_KEPT_TIMES = 3.3  # as measured: the same, most of the time
ROOM = 0.5  # of the granted memory


def may_keep(weight_bytes: float, granted_bytes: float) -> bool:
    """Whether there is room for a heap that keeps what was freed, and so is quicker."""
    return KEPT_TIMES * weight_bytes < ROOM * granted_bytes


def return_large_blocks(weight_bytes: int, granted_bytes: int | None, at_least_bytes: int = LARGE_BYTES) -> bool:
    """For this process, from now on, if memory is tight: fresh pages for each such block may halve the speed.

    `granted_bytes` None: nobody said how much there is, so it is. Does nothing where the C library has no such setting.
    """
    if granted_bytes is not None and may_keep(weight_bytes, granted_bytes):
        return False
    with suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, at_least_bytes))
    return False


def give_back() -> None:
    """What was freed goes back to the system now: after building, which leaves cycles and holes behind."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
