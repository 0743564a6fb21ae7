"""The warm parent process: imports what workers need once, forks one worker per request, reaps them.

Started by the daemon (`python -m node.warm_parent`) with one inherited SOCK_SEQPACKET socket. It runs no task code, no
tensor operation and no thread, so its forks are safe. Packets in: `fork`. Packets out: `warm` or `failed` once, then
`forked` and `exited` for each worker.

Invariants: nothing below it outlives it or the daemon. It dies with the daemon (SIGTERM by PDEATHSIG and the end of the
socket; not SIGKILL, since it first ends what workers started). It adopts orphans, as each worker does for its own
descendants, so a process that ends up as its child without being a worker belonged to a worker that has ended: it is
killed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NoReturn

from node import channel, prctl, process_tree, worker
from node.exit_report import EXIT_BROKEN
from protos.work import Outcome
from strategies.context import TaskContext

Entry = Callable[[TaskContext], Outcome]
_SWEEP_S = 2.0  # a killed orphan in an uninterruptible wait is left behind after this


@dataclass(frozen=True, slots=True)
class _Child:
    number: int
    pid: int
    pidfd: int


class WarmParent:
    def __init__(self, control: socket.socket, entry: Entry, wake: int) -> None:
        self._control = control
        self._entry = entry
        self._wake = wake  # readable when a signal asked us to end
        self._children: dict[int, _Child] = {}  # by pidfd

    def serve(self) -> None:
        """Until the daemon closes the socket or ends."""
        try:
            while True:
                ready, _, _ = select.select([self._control.fileno(), self._wake, *self._children], [], [])
                for descriptor in ready:
                    if descriptor in self._children:
                        self._reap(self._children[descriptor])
                if self._wake in ready or (self._control.fileno() in ready and not self._answer()):
                    return
        finally:
            self._end_all()

    def _answer(self) -> bool:
        """Performs one request; False at the end of the socket."""
        received = channel.receive_packet(self._control, descriptors=2)
        if received is None:
            return False
        request, descriptors = received
        number = int(request["number"])
        parent_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(parent_pid, request, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = _Child(number, pid, pidfd)
        self._tell({"kind": "forked", "number": number, "pid": pid})
        return True

    def _become_worker(self, parent_pid: int, request: Mapping[str, Any], connection: int, output: int) -> NoReturn:
        """In the child: its own session, its caps and its output first, then the task. Never returns."""
        status = EXIT_BROKEN
        try:
            os.setsid()
            if not prctl.die_with_parent(signal.SIGKILL, parent_pid):
                os._exit(status)
            os.dup2(output, 1)
            os.dup2(output, 2)
            for path in request["join"]:
                with open(path, "w") as procs:  # noqa: PTH123 - nothing but a write may come before the cap
                    procs.write(str(os.getpid()))
            prctl.adopt_orphans()
            os.close(signal.set_wakeup_fd(-1))  # who writes to it ends the parent, and every worker with it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self._control.close()
            for descriptor in (output, self._wake, *self._children):
                os.close(descriptor)
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123
                score.write(
                    "500"
                )  # when the machine runs out of memory, the worker goes before anything of the owner's
            os.environ.update(request["environment"])
            os.chdir(request["folder"])
            status = worker.main(socket.socket(fileno=connection), self._entry)
        except BaseException as error:
            sys.stderr.write(f"the worker could not start: {type(error).__name__}: {error}\n")
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)  # no interpreter exit: torch may abort in it

    def _reap(self, child: _Child) -> None:
        _, status, usage = os.wait4(child.pid, 0)
        os.close(child.pidfd)
        del self._children[child.pidfd]
        self._kill_orphans()
        self._tell(
            {
                "kind": "exited",
                "number": child.number,
                "status": status,
                "cpu_s": usage.ru_utime + usage.ru_stime,
                "peak_memory_bytes": usage.ru_maxrss * 1024,
            }
        )

    def _kill_orphans(self) -> None:
        workers = {child.pid for child in self._children.values()}
        deadline = time.monotonic() + _SWEEP_S
        # Killing an orphan makes its own children ours, so this goes on until none is left.
        while orphans := [pid for pid in process_tree.children(os.getpid()) if pid not in workers]:
            process_tree.send_signal(orphans, signal.SIGKILL)
            for pid in orphans:
                if not _wait_bounded(pid, deadline - time.monotonic()):
                    return

    def _end_all(self) -> None:
        for child in list(self._children.values()):
            process_tree.send_signal([child.pid], signal.SIGKILL)
        for child in list(self._children.values()):
            _wait_bounded(child.pid, _SWEEP_S)
        self._children.clear()
        self._kill_orphans()

    def _tell(self, packet: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the daemon is gone: the end of the socket is seen next
            channel.send_packet(self._control, packet)


def _wait_bounded(pid: int, timeout_s: float) -> bool:
    """Reaps a killed child; False when it has not ended in time."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        ended = bool(select.select([pidfd], [], [], max(0.0, timeout_s))[0])
    finally:
        os.close(pidfd)
    if ended:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    return ended


def load_entry(name: str) -> Entry:
    """The function named MODULE:FUNCTION."""
    module, _, function = name.partition(":")
    entry: Entry = getattr(importlib.import_module(module), function)
    return entry


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="node.warm_parent")
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--daemon", type=int, required=True)
    parser.add_argument("--entry", required=True)
    options = parser.parse_args(arguments)
    control = socket.socket(fileno=options.control)
    if not prctl.die_with_parent(signal.SIGTERM, options.daemon):  # until the handler below: ends at once
        return 1
    prctl.adopt_orphans()
    try:
        entry = load_entry(options.entry)
    except BaseException as error:
        with contextlib.suppress(OSError):
            channel.send_packet(control, {"kind": "failed", "message": f"{type(error).__name__}: {error}"[:2000]})
        return 1
    gc.collect()
    gc.freeze()  # the collector would otherwise touch, and so copy, every page shared with the workers
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != options.daemon:
        return 1
    try:
        torch_version: str | None = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch_version = None
    channel.send_packet(control, {"kind": "warm", "torch": torch_version})
    WarmParent(control, entry, wake_read).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
