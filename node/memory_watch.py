"""How much memory the workers of a node take, and which one must go when it is over the cap.

RSS is read first: it is cheap and never too low. Only when it is over the cap is the exact PSS read, which does not
count the pages that workers share with the warm parent more than once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from node import process_tree


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """`total_bytes` counts the warm parent too; `workers` maps a worker's pid to its whole tree."""

    total_bytes: int
    workers: Mapping[int, int]


def read(parent_pid: int, roots: Sequence[int], cap_bytes: int | None) -> MemoryReading:
    """What is taken now: RSS, or PSS when RSS is over the cap."""
    trees = {root: process_tree.tree(root) for root in roots}
    rough = {root: process_tree.resident_bytes(pids) for root, pids in trees.items()}
    total = sum(rough.values()) + process_tree.resident_bytes([parent_pid])
    if cap_bytes is None or total <= cap_bytes:
        return MemoryReading(total, rough)
    exact = {root: process_tree.proportional_bytes(pids) for root, pids in trees.items()}
    return MemoryReading(sum(exact.values()) + process_tree.proportional_bytes([parent_pid]), exact)


def culprit(reading: MemoryReading, cap_bytes: int | None) -> int | None:
    """The largest worker when the node is over its cap: one is ended at a time, then it is read again. Pure."""
    if cap_bytes is None or reading.total_bytes <= cap_bytes or not reading.workers:
        return None
    return max(reading.workers, key=lambda root: reading.workers[root])


def kernel_kills() -> int:
    """How many processes the kernel has ended for want of memory since boot; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    except (OSError, ValueError):
        return 0
