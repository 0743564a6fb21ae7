"""What /proc says of a process and of everything below it: children, memory, CPU time.

A process that ends while it is read counts as nothing; no function here raises for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: the name before it may hold spaces and brackets."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return []


def children(pid: int) -> list[int]:
    """Direct children, of every thread."""
    found: list[int] = []
    try:
        for task in (_PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += [int(child) for child in (task / "children").read_text().split()]
    except OSError:
        return []
    if not found and not (_PROC / "self" / "task" / str(os.getpid()) / "children").exists():
        return [child for child in _all_processes() if _parent(child) == pid]  # a kernel without PROC_CHILDREN
    return found


def _all_processes() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def _parent(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return int(fields[1]) if fields else None


def tree(root: int) -> list[int]:
    """The process and all its descendants, parents before children."""
    found = [root]
    for pid in found:
        found += [child for child in children(pid) if child not in found]
    return found


def session_members(session: int) -> list[int]:
    """Every live process of a session: what is left of a tree whose root is gone. Reads all of /proc."""
    members = []
    for pid in _all_processes():
        fields = _stat_fields(pid)
        if fields and fields[0] != "Z" and int(fields[3]) == session:
            members.append(pid)
    return members


def start_ticks(pid: int) -> int | None:
    """When the process started, in ticks since boot: with the pid it names a process for ever. None when it is gone."""
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else None


def is_stopped(pid: int) -> bool:
    """Stopped by a signal (or a debugger)."""
    return _stat_fields(pid)[:1] in (["T"], ["t"])


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process, also of those that ended, to the nanosecond; 0 when it is gone."""
    try:
        return time.clock_gettime(
            (~pid << 3) | 2
        )  # the kernel's name of another process's CPU clock, see clock_getres(2)
    except OSError:
        return 0.0


def resident_bytes(pids: Iterable[int]) -> int:
    """RSS summed: cheap, and never less than what the processes really take, since shared pages count for each."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int((_PROC / str(pid) / "statm").read_text().split()[1]) * _PAGE_BYTES
    return total


def proportional_bytes(pids: Iterable[int]) -> int:
    """PSS summed: a page shared by n processes counts 1/n for each. RSS where the kernel does not tell."""
    total = 0
    for pid in pids:
        try:
            rollup = (_PROC / str(pid) / "smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
        except (OSError, StopIteration, ValueError):
            total += resident_bytes([pid])
    return total


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    """To each that still lives and is ours."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


class CpuMeter:
    """CPU time of a changing set of processes, summed since the meter was made; what ended keeps what was last seen."""

    def __init__(self) -> None:
        self._last: dict[int, float] = {}
        self.total_s = 0.0

    def sample(self, pids: Iterable[int]) -> float:
        seen: dict[int, float] = {}
        for pid in pids:
            seen[pid] = cpu_s(pid)
            self.total_s += max(0.0, seen[pid] - self._last.get(pid, 0.0))
        self._last = seen
        return self.total_s
