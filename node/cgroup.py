"""Linux control groups: where ours is, a CPU quota below it, and what a container around us leaves of cores and memory.

Owns: finding the writable place (v2 and v1), groups named `hive-PID-STARTTIME-NUMBER`, removal of those whose daemon is
dead. Refuses to touch any other group. Parsing is pure; every class and function that writes raises OSError.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from node import process_tree

PERIOD_US = 100_000
MINIMUM_QUOTA_US = 1_000  # the kernel's own lower bound
_NAME = re.compile(r"^hive-(?P<pid>\d+)-(?P<start>\d+)-\d+$")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Place:
    """The folder of the group this process is in, in the hierarchy that carries one controller."""

    version: int  # 1 | 2
    folder: Path


def find_place(controller: str, mountinfo: str, membership: str) -> tuple[Place | None, Place | None]:
    """(v2, v1) places of a controller, from /proc/self/mountinfo and /proc/self/cgroup. Pure."""
    paths: dict[str, str] = {}
    for line in membership.splitlines():
        number, controllers, path = line.split(":", 2)
        for name in controllers.split(",") if number != "0" else [""]:
            paths[name] = path
    found: dict[int, Place] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" and "" in paths:
            found.setdefault(2, Place(2, _below(fields[4], fields[3], paths[""])))
        elif kind[0] == "cgroup" and controller in kind[2].split(",") and controller in paths:
            found.setdefault(1, Place(1, _below(fields[4], fields[3], paths[controller])))
    return found.get(2), found.get(1)


def _below(mount: str, root: str, path: str) -> Path:
    """A container sees its own group mounted as the root: the part of the path above it is not there."""
    try:
        relative = PurePosixPath(path).relative_to(root)
    except ValueError:
        relative = PurePosixPath()
    return Path(mount) / relative


def places(controller: str) -> tuple[Place | None, Place | None]:
    try:
        return find_place(controller, Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    except (OSError, ValueError):
        return None, None


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


def inherited_cpus() -> float | None:
    """The CPU quota of the container or service around us, in cores; None when there is none."""
    second, first = places("cpu")
    found: list[float] = []
    if second is not None:
        for folder in (second.folder, *second.folder.parents):
            with contextlib.suppress(OSError, ValueError):
                quota, period = (folder / "cpu.max").read_text().split()
                found.append(float(quota) / float(period))  # "max" is no number: no bound
    if first is not None:
        with contextlib.suppress(OSError, ValueError):
            quota_us = int((first.folder / "cpu.cfs_quota_us").read_text())
            period_us = int((first.folder / "cpu.cfs_period_us").read_text())
            if quota_us > 0:
                found.append(quota_us / period_us)
    return min(found, default=None)


def inherited_memory_bytes() -> int | None:
    """The memory bound of the container or service around us; None when there is none."""
    second, first = places("memory")
    found: list[int] = []
    if second is not None:
        for folder in (second.folder, *second.folder.parents):
            with contextlib.suppress(OSError, ValueError):
                found.append(int((folder / "memory.max").read_text()))
    if first is not None:
        with contextlib.suppress(OSError, ValueError):
            found.append(int((first.folder / "memory.limit_in_bytes").read_text()))
    return min(found, default=None)
