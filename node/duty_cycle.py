"""The CPU cap where no control group can be made: SIGSTOP and SIGCONT on the workers' trees, by measured CPU time.

A balance of CPU seconds grows at the granted rate and shrinks by what the trees really used, so an overshoot is paid
back and the long-run share is exact whatever the number of threads. Invariant: what is detached or left is running.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from node import process_tree

QUANTUM_S = 0.02  # CPU seconds saved up before the trees run again: small enough to stay responsive
_KEPT_S = 0.25  # of an unused grant so much is kept: a late wake-up of the daemon loses nothing
_SHORTEST_WAIT_S = 0.005
_LONGEST_WAIT_S = 0.2
_TREE_EVERY_S = 0.05  # how often new descendants are looked for: until then they run free, and all pay it back


@dataclass(frozen=True, slots=True)
class Duty:
    run: bool
    wait_s: float


class DutyController:
    """Pure: fed the clock and the CPU time used so far, says whether the trees may run and when to look again."""

    def __init__(self, cpus: float, now_s: float) -> None:
        self._cpus = cpus
        self._now_s = now_s
        self._used_s = 0.0
        self._balance_s = QUANTUM_S
        self._running = True

    def step(self, now_s: float, used_s: float) -> Duty:
        elapsed = max(0.0, now_s - self._now_s)
        used = max(0.0, used_s - self._used_s)
        self._now_s, self._used_s = now_s, used_s
        most = QUANTUM_S + _KEPT_S * self._cpus
        self._balance_s = min(most, self._balance_s + elapsed * self._cpus - used)
        # A balance filled to within rounding is full; without this a stopped tree could wait for the last nanosecond.
        self._running = self._balance_s > 0 if self._running else self._balance_s >= QUANTUM_S * 0.999
        if self._running:
            burn = max(1.0, used / elapsed if elapsed else 1.0)  # cores in use
            wait = self._balance_s / burn
        else:
            wait = (QUANTUM_S - self._balance_s) / self._cpus
        return Duty(self._running, min(_LONGEST_WAIT_S, max(_SHORTEST_WAIT_S, wait)))


async def enforce(cpus: float, roots: Callable[[], Sequence[int]]) -> None:
    """Holds the trees below the roots to so many cores together until cancelled."""
    controller = DutyController(cpus, time.monotonic())
    meter = process_tree.CpuMeter()
    members: list[int] = []
    known_roots: list[int] = []
    looked_s = 0.0
    stopped: set[int] = set()
    try:
        while True:
            now_s = time.monotonic()
            current = list(roots())
            if current != known_roots or now_s - looked_s > _TREE_EVERY_S:
                known_roots, looked_s = current, now_s
                members = [pid for root in current for pid in process_tree.tree(root)]
            duty = controller.step(now_s, meter.sample(members))
            if duty.run:
                process_tree.send_signal(stopped, signal.SIGCONT)
                stopped.clear()
            else:
                fresh = [pid for pid in members if pid not in stopped]
                process_tree.send_signal(fresh, signal.SIGSTOP)
                stopped.update(fresh)
            await asyncio.sleep(duty.wait_s)
    finally:
        process_tree.send_signal(stopped, signal.SIGCONT)
