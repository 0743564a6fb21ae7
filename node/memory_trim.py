"""Giving free memory back to the system: a measurement that moved megabytes leaves them in the allocator otherwise.

Refuses nothing and promises nothing: on a system without glibc it does nothing.
"""

from __future__ import annotations

import ctypes


def trim() -> None:
    """A few milliseconds."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
