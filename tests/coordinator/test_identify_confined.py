"""The child that reads strangers' files: what it has given up before it reads the first byte, tried from inside."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.identify import child, confine, system_calls

ROOT = str(Path(child.__file__).parents[2])
INSIDE = """
import ctypes, os, socket, sys, threading
sys.path.insert(0, sys.argv[1])
from coordinator.identify import child
held = child.confine()
{attempt}
os._exit(0)
"""
REFUSED = {
    "a file": "os.open('/etc/hostname', os.O_RDONLY)",
    "a folder": "os.listdir('/')",
    "a new file": "os.open('/tmp/hive-test-made', os.O_WRONLY | os.O_CREAT)",
    "removing a file": "os.unlink('/tmp/hive-test-made')",
    "a name": "os.stat('/etc/hostname')",
    "another descriptor": "os.dup(0)",
    "memory": "bytearray(1 << 31)",
    "a thread": "threading.Thread(target=print).start()",
}
DEADLY = {
    "a program": "os.execv('/bin/true', ['true'])",
    "a process": "os.fork()",
    "a socket": "socket.socket()",
    "a signal": "os.kill(os.getppid(), 0)",
}

linux = pytest.mark.skipif(
    sys.platform != "linux" or not asyncio.run(confine.bounds_held()).get("few system calls (seccomp)"),
    reason="this kernel has no seccomp",
)


def inside(attempt: str) -> int:
    started = [sys.executable, "-I", "-c", INSIDE.format(attempt=attempt), ROOT]
    return subprocess.run(started, capture_output=True, check=False).returncode


@linux
@pytest.mark.parametrize("what", REFUSED)
def test_what_a_reader_does_not_need_fails(what: str) -> None:
    attempt = f"try:\n    {REFUSED[what]}\nexcept (OSError, MemoryError, RuntimeError):\n    os._exit(7)"
    assert inside(attempt) in (7, -signal.SIGSYS)


@linux
@pytest.mark.parametrize("what", DEADLY)
def test_what_no_reader_ever_does_ends_it(what: str) -> None:
    assert inside(DEADLY[what]) == -signal.SIGSYS


@linux
def test_what_reading_takes_goes_on() -> None:
    attempt = "import time\nassert os.getpid() and time.time() and bytes(1 << 26)"
    assert inside(attempt) == 0


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_filter_is_whole_instructions_and_ends_with_a_verdict(machine: str) -> None:
    code = system_calls.filter_of(machine)
    assert len(code) % 8 == 0
    assert code[-8:-4] == b"\x06\x00\x00\x00"


def test_what_holds_is_said_by_name() -> None:
    held = asyncio.run(confine.bounds_held())
    assert held["bounded memory and time"]
    if sys.platform == "linux":
        assert held["no new privileges"]


def test_a_child_that_cannot_start_holds_nothing() -> None:
    assert asyncio.run(confine.bounds_held(deadline_s=0.0)) == {"the child starts": False}
