"""What this process may use of the machine: its affinity, and what a container or service around it leaves.

Owns: where our control groups are (v2 and v1) and which bounds of cores and memory they set, so that a node and who
starts nodes count the same machine. Refuses to write: a CPU cap is the node's. What cannot be read is no bound.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

PROC = Path("/proc/self")


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
        return find_place(controller, (PROC / "mountinfo").read_text(), (PROC / "cgroup").read_text())
    except (OSError, ValueError):
        return None, None


def available_cores() -> float:
    """Cores that processes started here could use: affinity, and the quota of a container or service around us."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota = inherited_cpus()
    return allowed if quota is None else min(allowed, quota)


def available_memory_bytes() -> int:
    """Memory of the machine, or of the container around us."""
    total: int = psutil.virtual_memory().total
    bound = inherited_memory_bytes()
    return total if bound is None else min(total, bound)


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
