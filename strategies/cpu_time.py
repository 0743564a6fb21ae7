"""CPU time of this process, without the threads that carry collectives: what computing really took.

Under a cap the clock on the wall says less: a quota that was not used while a rank waited lets it run faster than its
share afterwards. Copying to and from other ranks is part of a group's cost, not of the model's, and libraries do it in
threads of their own, which are known by their names (Linux; elsewhere nothing is told apart).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_CARRIERS = ("gloo", "pt_gloo", "pt_nccl", "nccl", "pt_tcpstore")  # first letters of names of threads
_THREADS = Path("/proc/self/task")
_OF_A_THREAD = 0b110  # of a clock id: CPU time that the scheduler counted, of one thread


class CpuSeconds(NamedTuple):
    computing: float
    carrying: float  # by threads that carry collectives


class CpuTime:
    """`seconds` grow while this process runs. Threads that carry collectives are looked up once, here: a group is made
    before its first step."""

    def __init__(self) -> None:
        self._carriers = tuple((~thread << 3) | _OF_A_THREAD for thread in _carriers())

    def seconds(self) -> CpuSeconds:
        carrying_s = sum(map(_seconds, self._carriers))
        return CpuSeconds(time.process_time() - carrying_s, carrying_s)


def _carriers() -> list[int]:
    found = []
    with suppress(OSError):
        for entry in _THREADS.iterdir():
            with suppress(OSError):  # it ended meanwhile
                if (entry / "comm").read_text().startswith(_CARRIERS) and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
    return found


def _seconds(clock: int) -> float:
    with suppress(OSError):  # the thread ended
        return time.clock_gettime(clock)
    return 0.0
