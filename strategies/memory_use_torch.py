"""The peak memory this process has used: resident on the host, plus what was allocated on its device."""

from __future__ import annotations

import resource

import torch


def peak_bytes(device: torch.device) -> int:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return host + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
