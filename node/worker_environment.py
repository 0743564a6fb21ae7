"""Which environment variables a worker sees. Pure.

An allow-list: tokens, credentials, proxies with passwords and everything else of the owner's shell stay out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

_KEPT = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}
    | {"PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "PYTHONWARNINGS"}
    | {"NO_COLOR", "SSL_CERT_FILE", "SSL_CERT_DIR"}
    | {"CUDA_HOME", "CUDA_PATH", "CUDA_MODULE_LOADING", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}
)
_ROOMS = Path(__file__).resolve().parent.parent
_KEPT_PREFIXES = ("LC_",)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# numpy's OpenBLAS starts its threads when it is imported: none may run in the parent when it forks.
_NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
# glibc: a step's activations are freed and wanted again; given back to the kernel each time, they cost page faults.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2), "MALLOC_TRIM_THRESHOLD_": str(256 * 1024**2)}


def clean_environment(source: Mapping[str, str], cpus: float) -> dict[str, str]:
    """For the warm parent and so for every worker: libraries read their number of threads when they are loaded."""
    kept = {name: value for name, value in source.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    threads = str(max(1, math.ceil(cpus)))
    if _ROOMS.name not in ("site-packages", "dist-packages"):  # run from a checkout: workers run the same code
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOMS), kept.get("PYTHONPATH", "")]))
    return kept | dict.fromkeys(_THREAD_VARIABLES, threads) | _NO_THREADS | _KEEP_FREED_MEMORY


def device_environment(device: str) -> tuple[dict[str, str], str]:
    """What hides every GPU but the granted one from a worker, and how the worker then calls its device."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        return {"CUDA_VISIBLE_DEVICES": index or "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, "cuda:0"
    return {"CUDA_VISIBLE_DEVICES": ""}, device
