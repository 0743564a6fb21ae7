"""Which mechanism holds the workers to the granted cores: chosen by trial, best first, and why the better ones are not.

Every mechanism is a CpuLimit. The trial makes a real group and puts a real process in it: permission bits say too
little.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from node import cgroup, duty_cycle
from protos import machine_bounds

Roots = Callable[[], Sequence[int]]


class CpuLimit(Protocol):
    """One node's CPU cap, for all its workers together."""

    @property
    def mechanism(self) -> str:
        """cgroup2 | cgroup1 | duty_cycle | none"""

    @property
    def reason(self) -> str:
        """One sentence for `doctor`: why this mechanism, and why no better one."""

    @property
    def join(self) -> tuple[str, ...]:
        """Files a new worker writes its pid into before it does anything else."""

    async def enforce(self, roots: Roots) -> None:
        """Runs while there are workers and is then cancelled; `roots` gives their pids now."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class NoLimit:
    reason: str
    mechanism: str = "none"
    join: tuple[str, ...] = ()

    async def enforce(self, roots: Roots) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to undo."""


@dataclass(frozen=True, slots=True)
class GroupLimit:
    mechanism: str
    reason: str
    group: cgroup.CpuGroup

    @property
    def join(self) -> tuple[str, ...]:
        return (str(self.group.procs),)

    async def enforce(self, roots: Roots) -> None:
        """The kernel does."""

    async def close(self) -> None:
        await self.group.remove()


@dataclass(frozen=True, slots=True)
class DutyLimit:
    cpus: float
    reason: str
    mechanism: str = "duty_cycle"
    join: tuple[str, ...] = ()

    async def enforce(self, roots: Roots) -> None:
        await duty_cycle.enforce(self.cpus, roots)

    async def close(self) -> None:
        """Nothing outlives `enforce`."""


async def choose(cpus: float | None, available: float, among: Sequence[str] = ("cgroup2", "cgroup1")) -> CpuLimit:
    """The best mechanism that works here. `available`: cores this machine would give without a cap."""
    if cpus is None or cpus >= available:
        return NoLimit(f"no CPU cap below this machine's {available:g} cores is asked for")
    refused: list[str] = []
    second, first = machine_bounds.places("cpu")
    for name, place in (("cgroup2", second), ("cgroup1", first)):
        if name not in among:
            continue
        if place is None:
            refused.append(f"{name}: not mounted here")
            continue
        try:
            group = await _tried(place, cpus)
        except OSError as error:
            refused.append(f"{name}: {error}")
            continue
        passed_over = f" ({'; '.join(refused)})" if refused else ""
        return GroupLimit(name, f"quota of {cpus:g} cores in {group.folder}{passed_over}", group)
    return DutyLimit(cpus, f"{cpus:g} cores by stopping and continuing workers ({'; '.join(refused)})")


async def _tried(place: machine_bounds.Place, cpus: float) -> cgroup.CpuGroup:
    """A group that a process of ours could join. Raises OSError otherwise, leaving nothing."""
    group = cgroup.CpuGroup(place, cpus)
    try:
        probe = await asyncio.to_thread(
            subprocess.Popen, ["sleep", "10"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=os.sep
        )
    except FileNotFoundError:
        return group  # no sleep(1) on this system: the first worker will tell
    try:
        group.procs.write_text(str(probe.pid))
    except OSError:
        probe.kill()
        await asyncio.to_thread(probe.wait)
        await group.remove()
        raise
    probe.kill()
    await asyncio.to_thread(probe.wait)
    return group
