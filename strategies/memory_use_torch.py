"""The peak memory this process has used: resident on the host, plus what was allocated on its device."""

from __future__ import annotations

import resource
from pathlib import Path

import torch


def peak_bytes(device: torch.device) -> int:
    """VmHWM, not ru_maxrss: that one still counts what the process was before it became this program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    host = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    return host + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


def now_bytes(device: torch.device) -> int:
    """What it uses at this moment."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() + (torch.cuda.memory_allocated(device) if device.type == "cuda" else 0)
