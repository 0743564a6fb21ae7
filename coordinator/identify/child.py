"""The confined process that reads a stranger's model file from its stdin; confine.py starts it isolated.

It gives up memory, processor time, files, network and privileges before it reads the first byte, and answers with one
line of JSON on stdout: {"profile": ...} or {"error": {"code", "message", "hint"}}.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import resource
import signal
import sys

from coordinator.identify import parse
from protos.errors import SpecError

MEMORY_BYTES = 768 * 1024 * 1024
PROCESSOR_S = 20
OPEN_FILES = 16
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def confine() -> None:
    """Bounds that cannot be taken back. What the kernel does not offer is skipped; the limits always hold."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        if libc.unshare(_CLONE_NEWNET) != 0:
            libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, PROCESSOR_S),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (bound, bound))


def answer() -> str:
    """The one line for stdout."""
    try:
        with os.fdopen(0, "rb", closefd=False) as file:
            return json.dumps({"profile": dataclasses.asdict(parse.identify(file))})
    except SpecError as error:
        return json.dumps({"error": error.document()})
    except MemoryError:
        return json.dumps({"error": {"code": "model_unusable", "message": "", "hint": ""}})


def main() -> None:
    confine()
    os.write(1, answer().encode())


if __name__ == "__main__":
    main()
