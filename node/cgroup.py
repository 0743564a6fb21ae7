"""Linux control groups: a CPU quota below ours. Where ours is and what bounds it: `protos.machine_bounds`.

Owns: groups named `hive-PID-STARTTIME-NUMBER`, removal of those whose daemon is dead. Refuses to touch any other group.
Every class and function that writes raises OSError.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
from pathlib import Path

from node import process_tree
from protos.machine_bounds import Place

PERIOD_US = 100_000
MINIMUM_QUOTA_US = 1_000  # the kernel's own lower bound
_NAME = re.compile(r"^hive-(?P<pid>\d+)-(?P<start>\d+)-\d+$")
_numbers = itertools.count()


class CpuGroup:
    """A control group with a CPU quota for all processes that join it and all they start."""

    def __init__(self, place: Place, cpus: float) -> None:
        """Makes the group and sets the quota. Raises OSError where that is not allowed; leaves nothing behind then."""
        name = f"hive-{os.getpid()}-{process_tree.start_ticks(os.getpid())}-{next(_numbers)}"
        remove_stale(place.folder)
        self.folder = place.folder / name
        quota_us = max(MINIMUM_QUOTA_US, round(cpus * PERIOD_US))
        if place.version == 2:
            _enable_cpu(place.folder)
        self.folder.mkdir()
        try:
            if place.version == 2:
                (self.folder / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
            else:
                (self.folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (self.folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        except OSError:
            self.folder.rmdir()
            raise

    @property
    def procs(self) -> Path:
        """A process joins by writing its pid here."""
        return self.folder / "cgroup.procs"

    async def remove(self) -> None:
        """Kills what is still inside and removes the group; within a second, else it is left for the next start."""
        for _ in range(50):
            with contextlib.suppress(OSError):
                _kill_members(self.folder)
                self.folder.rmdir()
            if not self.folder.exists():
                return
            await asyncio.sleep(0.02)  # the kernel empties a group shortly after its last process ended


def _enable_cpu(folder: Path) -> None:
    """Makes the CPU controller usable in sub-groups, moving ourselves into a leaf where v2 demands it."""
    control = folder / "cgroup.subtree_control"
    if "cpu" in control.read_text().split():
        return
    if "cpu" not in (folder / "cgroup.controllers").read_text().split():
        raise OSError(f"the cpu controller is not delegated to {folder}")
    try:
        control.write_text("+cpu")
    except OSError:
        # v2 wants processes in leaves only. The group is ours to rearrange when nothing but our own tree is in it.
        members = {int(pid) for pid in (folder / "cgroup.procs").read_text().split()}
        if not members or not members <= set(process_tree.tree(os.getpid())):
            raise
        leaf = folder / f"hive-{os.getpid()}-{process_tree.start_ticks(os.getpid())}-{next(_numbers)}"
        leaf.mkdir()
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                (leaf / "cgroup.procs").write_text(str(pid))
        control.write_text("+cpu")


def _kill_members(folder: Path) -> None:
    members = [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
    process_tree.send_signal([pid for pid in members if pid > 0 and pid != os.getpid()], signal.SIGKILL)


def remove_stale(folder: Path) -> list[str]:
    """Ends and removes the groups of daemons that died without doing so; returns their names."""
    removed = []
    for group in folder.glob("hive-*"):
        found = _NAME.match(group.name)
        if found is None or process_tree.start_ticks(int(found["pid"])) == int(found["start"]):
            continue
        with contextlib.suppress(OSError):
            _kill_members(group)
            group.rmdir()
            removed.append(group.name)
    return removed
