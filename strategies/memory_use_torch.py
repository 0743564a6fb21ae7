"""The peak memory this process has used: resident on the host, plus what was allocated on its device."""

from __future__ import annotations

import resource
from pathlib import Path

import torch


def peak_bytes(device: torch.device) -> int:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return host + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


def now_bytes(device: torch.device) -> int:
    """What it uses at this moment."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() + (torch.cuda.memory_allocated(device) if device.type == "cuda" else 0)
