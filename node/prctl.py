"""Two process attributes Python has no call for: die with the parent, and adopt orphaned descendants (prctl(2))."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def die_with_parent(number: signal.Signals, parent_pid: int) -> bool:
    """This process gets the signal when its parent ends. False when the parent has ended already."""
    _prctl(_PR_SET_PDEATHSIG, int(number))
    return os.getppid() == parent_pid


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process instead of pid 1's: none can slip away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
