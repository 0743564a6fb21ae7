"""The confined process that reads a stranger's model; confine.py starts it isolated.

It gives up memory, processor time, files, network, other processes and privileges before it reads the first byte, and
answers with one line of JSON on stdout: {"profile": ...} or {"error": {"code", "message", "hint"}}. Invariants: what
readers need is imported before the start, because afterwards no file can be opened; what it reads was opened for it.
"""

from __future__ import annotations

import codecs
import ctypes
import dataclasses
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping

from coordinator.identify import folder_readers, parse, system_calls
from coordinator.identify.folder import Folder
from protos.errors import ErrorCode, SpecError
from protos.model import ModelProfile

MEMORY_BYTES = 768 * 1024 * 1024
PROCESSOR_S = 20
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_CODECS = ("cp437", "utf-8-sig", "latin-1", "ascii", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le",
           "utf-32-be", "unicode_escape", "raw_unicode_escape")  # fmt: skip


def confine() -> dict[str, bool]:
    """Bounds that cannot be taken back, by name: whether each holds. The limits of resources always do."""
    for name in _CODECS:
        codecs.lookup(name)
    held: dict[str, bool] = {}
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        held["a network of its own"] = (
            libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0
        )
        held["no new privileges"] = system_calls.no_new_privileges(libc)
        held["no files (Landlock)"] = system_calls.no_files(libc)
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, PROCESSOR_S),
        (resource.RLIMIT_NOFILE, 0),  # what is open stays open; nothing more
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (bound, bound))
    held["bounded memory and time"] = True
    if libc is not None:
        held["few system calls (seccomp)"] = system_calls.few_system_calls(libc)
    return held


def profile_of_file() -> ModelProfile:
    with os.fdopen(0, "rb", closefd=False) as file:
        return parse.identify(file)


def profile_of_folder() -> ModelProfile:
    """Which file was opened as which descriptor comes on stdin: {"descriptors": {name: n}, "sizes": {name: n}}."""
    with os.fdopen(0, "rb", closefd=False) as listing:
        listed = json.load(listing)
    files = {name: os.fdopen(number, "rb", closefd=False) for name, number in listed["descriptors"].items()}
    return folder_readers.identify(Folder(files, listed["sizes"]))


def answer(find: Callable[[], ModelProfile]) -> Mapping[str, object]:
    """What goes to stdout, whatever the bytes do to their reader."""
    try:
        return {"profile": dataclasses.asdict(find())}
    except SpecError as error:
        return {"error": error.document()}
    except MemoryError:
        return {"error": {"code": ErrorCode.MODEL_UNUSABLE, "message": "", "hint": ""}}
    except Exception as error:  # of a reader that did not expect such bytes: no reason to die without a word
        message = f"the file is damaged in a way that its reader does not know ({type(error).__name__})"
        return {"error": {"code": ErrorCode.MODEL_UNUSABLE, "message": message, "hint": "copy it again"}}


def main() -> None:
    held = confine()
    match sys.argv[2]:
        case "file":
            said = answer(profile_of_file)
        case "folder":
            said = answer(profile_of_folder)
        case _:
            said = {"held": held}
    rest = memoryview(json.dumps(said).encode())
    while rest:
        rest = rest[os.write(1, rest) :]
    os._exit(0)  # the interpreter's own way out would open and load


if __name__ == "__main__":
    main()
