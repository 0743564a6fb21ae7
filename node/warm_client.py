"""The daemon's end of the warm parent: starts the process, asks it for workers, hears of their ends.

One instance is one process. When the process ends, for whatever reason, every worker it had is reported as ended with
what is left of its session killed. Invariant: `on_exit` is called once for every forked worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node import channel, process_tree
from node.exit_report import Ending
from protos.errors import DeadlineExceeded, HiveError

WARM_S = 180.0  # torch from a cold disk
FORK_S = 10.0
_END_S = 4.0
OnExit = Callable[[Ending], None]


@dataclass(frozen=True, slots=True)
class Fork:
    """What a new worker needs before it runs: `connection` and `output` are passed on and closed here."""

    connection: int
    output: int
    join: Sequence[str]
    environment: Mapping[str, str]
    folder: Path


@dataclass(slots=True)
class _Child:
    on_exit: OnExit
    pid: asyncio.Future[int]


class WarmClient:
    def __init__(self, entry: str, folder: Path, environment: Mapping[str, str]) -> None:
        self._entry = entry
        self._folder = folder
        self._environment = dict(environment)
        self._numbers = itertools.count(1)
        self._children: dict[int, _Child] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._warm: asyncio.Future[str | None] | None = None

    @property
    def alive(self) -> bool:
        return self._control is not None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> str | None:
        """Starts the process and waits until it has imported; returns its version of torch, None without torch."""
        loop = asyncio.get_running_loop()
        self._warm = loop.create_future()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-P", "-m", "node.warm_parent", "--control", str(theirs.fileno())]
        command += ["--daemon", str(os.getpid()), "--entry", self._entry]
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - a few ms; a thread that ended would take its child along
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=self._folder,
                env=self._environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._control = ours
        loop.add_reader(ours.fileno(), self._readable)
        try:
            async with asyncio.timeout(WARM_S):
                return await asyncio.shield(self._warm)
        except TimeoutError:
            await self.close()
            raise DeadlineExceeded(
                f"the worker process was not ready within {WARM_S:g} s", "is the disk or the CPU overloaded?"
            ) from None
        except BaseException:
            await self.close()
            raise

    async def fork(self, request: Fork, on_exit: OnExit) -> int:
        """A new worker's pid. `on_exit` is called once when it has ended and been reaped, unless this raises."""
        number = next(self._numbers)
        child = _Child(on_exit, asyncio.get_running_loop().create_future())
        packet = {
            "kind": "fork",
            "number": number,
            "join": list(request.join),
            "environment": dict(request.environment),
            "folder": str(request.folder),
        }
        try:
            if self._control is None:
                raise HiveError("the worker's parent process has ended", "try again")
            self._children[number] = child
            channel.send_packet(self._control, packet, [request.connection, request.output])
            async with asyncio.timeout(FORK_S):
                return await asyncio.shield(child.pid)
        except (TimeoutError, OSError) as error:
            self._children.pop(number, None)
            await self.close()  # it does not answer: with it goes whatever it forked
            raise HiveError(f"the worker's parent process does not answer: {error}", "try again") from None
        except BaseException:
            self._children.pop(number, None)
            raise
        finally:
            os.close(request.connection)
            os.close(request.output)

    def _readable(self) -> None:
        assert self._control is not None
        try:
            received = channel.receive_packet(self._control)
        except BlockingIOError:
            return
        except (OSError, HiveError):
            received = None
        if received is None:
            self._ended()
        else:
            self._heard(received[0])

    def _heard(self, packet: Mapping[str, Any]) -> None:
        match packet["kind"]:
            case "warm" if self._warm is not None and not self._warm.done():
                self._warm.set_result(packet["torch"])
            case "failed" if self._warm is not None and not self._warm.done():
                hint = "install the node's libraries with: pip install 'hive[node]'"
                self._warm.set_exception(HiveError(f"workers cannot start: {packet['message']}", hint))
            case "forked":
                child = self._children.get(packet["number"])
                if child is not None and not child.pid.done():
                    child.pid.set_result(packet["pid"])
            case "exited":
                child = self._children.pop(packet["number"], None)
                if child is not None:
                    child.on_exit(Ending(packet["status"], packet["cpu_s"], packet["peak_memory_bytes"]))

    def _ended(self) -> None:
        """The process closed its end: it has ended or is about to."""
        if self._control is None:
            return
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()
        self._control = None
        error = HiveError("the worker's parent process ended unexpectedly", "see the node's log; it is started again")
        if self._warm is not None and not self._warm.done():
            self._warm.set_exception(error)
        children, self._children = self._children, {}
        for child in children.values():
            if child.pid.done():
                # Workers die with their parent by PDEATHSIG; what they started is found by its session.
                process_tree.send_signal(process_tree.session_members(child.pid.result()), signal.SIGKILL)
                child.on_exit(Ending(None))
            else:
                child.pid.set_exception(error)

    async def close(self) -> None:
        """Ends the process and every worker below it, within seconds."""
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_WR)  # it ends its workers, reports nothing more, and exits
        if self._process is not None:
            await asyncio.to_thread(_end, self._process)
        self._ended()
        if self._warm is not None and self._warm.done() and not self._warm.cancelled():
            self._warm.exception()  # looked at: it was raised where it was waited for, or nobody waits any more


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
