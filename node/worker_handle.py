"""The daemon's view of one worker process: what it says goes to a handler, what it is told goes out, its end too.

The other end runs a stranger's code: every frame is checked, and one that is malformed or names a file outside the
task's folders ends the worker with kind `policy`. Invariant: `on_exit` is called exactly once, after everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from node import channel, memory_watch, process_tree
from node.channel import Frame
from node.exit_report import Ending, ExitKind, ExitReport, Kill, report
from node.log_lines import LineSplitter
from protos import documents
from protos.artifact import check_path
from protos.errors import Conflict, DeadlineExceeded, HiveError, NotFound, SpecError
from protos.log import Log
from protos.states import StopMode
from protos.work import Outcome, Progress
from strategies.context import Workspace

SILENCE_S = 5.0
BUSY_SILENCE_S = 60.0  # a long call into a library may keep the interpreter's lock: it uses CPU, so it is not frozen
_DRAIN_S = 2.0
_LINES_KEPT = 20
_LOG_READ_BYTES = 64 * 1024
MAX_OPEN_STORE_CALLS = 256
_LONGEST_STORE_CALL_S = 3600.0

_log = Log("hive.node.worker_handle")


class StoreAnswer(Protocol):
    """What a store call gives; the StoreReply message of work.proto is one."""

    @property
    def status(self) -> str:
        """ok | timeout | missing | refused"""

    @property
    def value(self) -> bytes: ...
    @property
    def number(self) -> int: ...
    @property
    def message(self) -> str: ...


@dataclass(frozen=True, slots=True)
class StoreResult:
    status: str = "ok"
    value: bytes = b""
    number: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class _StoreCall:
    operation: str
    keys: list[str]
    value: bytes
    expected: bytes
    amount: int
    timeout_s: float

    @staticmethod
    def of(frame: Frame) -> _StoreCall:
        header = frame.header
        size = int(header["value_bytes"])
        return _StoreCall(
            str(header["operation"]),
            [str(key) for key in header["keys"]],
            frame.body[:size],
            frame.body[size:],
            int(header["amount"]),
            min(max(0.0, float(header["timeout_s"])), _LONGEST_STORE_CALL_S),
        )


class WorkerHandler(Protocol):
    """What a daemon does with what a worker says. Called in the event loop; only the store call may wait."""

    def on_ready(self) -> None: ...
    def on_progress(self, progress: Progress) -> None: ...
    def on_checkpoint(self, folder: Path, step: int, samples: int) -> None: ...
    def on_artifact(self, name: str, path: Path) -> None: ...
    def on_store_call(
        self, operation: str, keys: Sequence[str], value: bytes, expected: bytes, amount: int, timeout_s: float
    ) -> Awaitable[StoreAnswer]: ...
    def on_log(self, lines: list[str]) -> None: ...
    def on_exit(self, report: ExitReport) -> None:
        """Once, and last."""


class WorkerHandle:
    """A running worker. Made by Runner.start."""

    def __init__(self, connection: socket.socket, output: int, workspace: Workspace, handler: WorkerHandler) -> None:
        self._connection = connection
        self._output = output
        self._workspace = workspace
        self._handler = handler
        self._pid = 0
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._finished: asyncio.Future[ExitReport] = asyncio.get_running_loop().create_future()
        self._writer: asyncio.StreamWriter | None = None
        self._outcome: Outcome | None = None
        self._kill: Kill | None = None
        self._last_lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._store_calls: set[asyncio.Task[None]] = set()
        self._kernel_kills = memory_watch.kernel_kills()
        self._peak_memory_bytes = 0
        self._heard_s = asyncio.get_running_loop().time()
        self._heard_cpu_s = 0.0
        self._pings = 0

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def outcome(self) -> Outcome | None:
        """What the task returned, once it has."""
        return self._outcome

    @property
    def running(self) -> bool:
        return not self._ending.done()

    async def wait(self) -> ExitReport:
        """Until `on_exit` was called."""
        return await asyncio.shield(self._finished)

    async def stop(self, mode: StopMode, grace_s: float | None = None) -> None:
        """Asks the task to end; with `grace_s`, ends it after that time if it has not."""
        self._tell(Frame({"kind": "stop", "mode": mode.value}))
        if grace_s is not None and self.running:
            done, _ = await asyncio.wait({self._finished}, timeout=grace_s)
            if not done:
                await self.kill(ExitKind.KILLED, f"asked to {mode.value}, it did not end within {grace_s:g} s")

    def checkpoint_settled(self) -> None:
        """One checkpoint that the worker announced is uploaded, or will not be. Said once for each of them."""
        self._tell(Frame({"kind": "settled"}))

    async def kill(self, kind: ExitKind = ExitKind.KILLED, message: str = "ended by the node") -> None:
        """Ends the whole tree at once and waits for it, bounded."""
        self.kill_now(kind, message)
        await asyncio.wait({self._finished}, timeout=2 * _DRAIN_S)

    def kill_now(self, kind: ExitKind, message: str) -> None:
        """The first reason stays. What the worker started is ended by the warm parent when the worker has ended."""
        if self._kill is None and self.running:
            self._kill = Kill(kind, message)
        if self.running and self._pid:
            process_tree.send_signal([self._pid], signal.SIGKILL)

    # What the runner feeds in.

    def exited(self, ending: Ending) -> None:
        if not self._ending.done():
            self._ending.set_result(ending)

    def memory(self, tree_bytes: int) -> None:
        self._peak_memory_bytes = max(self._peak_memory_bytes, tree_bytes)

    def check_alive(self, now_s: float) -> None:
        """Once a second: another ping, or the end of a worker that no longer answers."""
        self._pings += 1
        self._tell(Frame({"kind": "ping", "number": self._pings}))
        silent_s = now_s - self._heard_s
        if silent_s < SILENCE_S:
            return
        worked = process_tree.cpu_s(self._pid) - self._heard_cpu_s > 0.1 and not process_tree.is_stopped(self._pid)
        if not worked or silent_s >= BUSY_SILENCE_S:
            self.kill_now(ExitKind.CRASH, f"worker stopped answering for {silent_s:.0f} s")

    def heard(self, now_s: float) -> None:
        """It answered, or nobody could have heard it (this machine slept)."""
        self._heard_s = now_s
        self._heard_cpu_s = process_tree.cpu_s(self._pid)

    async def live(self, pid: int, first: Frame) -> None:
        """The whole life of the worker, from its first frame to its report."""
        self._pid = pid
        reader, self._writer = await asyncio.open_unix_connection(sock=self._connection, limit=2**20)
        self.heard(asyncio.get_running_loop().time())
        self._tell(first)
        frames = asyncio.create_task(self._read_frames(reader))
        logs = asyncio.create_task(self._read_output())
        tasks = {frames, logs}
        try:
            either: set[asyncio.Future[Any]] = {frames, self._ending}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not self._ending.done():
                await asyncio.wait({self._ending}, timeout=SILENCE_S)
                self.kill_now(ExitKind.CRASH, "the worker closed its channel without ending")
            await asyncio.wait({self._ending})
            await asyncio.wait(tasks, timeout=_DRAIN_S)
        finally:
            for task in tasks | self._store_calls:
                task.cancel()
            await asyncio.gather(*tasks, *self._store_calls, return_exceptions=True)
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
            self._finish()

    def _finish(self) -> None:
        ending = self._ending.result() if self._ending.done() else Ending(None)
        peak = max(self._peak_memory_bytes, ending.peak_memory_bytes)
        ending = Ending(ending.status, ending.cpu_s, peak)
        kernel_killed = memory_watch.kernel_kills() > self._kernel_kills
        result = report(ending, self._outcome, self._kill, tuple(self._last_lines), kernel_killed)
        try:
            self._handler.on_exit(result)
        except Exception:
            _log.exception("worker_exit_handler_failed", pid=self._pid)
        if not self._finished.done():
            self._finished.set_result(result)

    def _tell(self, frame: Frame) -> None:
        if self._outcome is not None:
            return  # it has heard that it may end
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(channel.pack(frame))

    async def _read_frames(self, reader: asyncio.StreamReader) -> None:
        try:
            while (frame := await channel.read_frame(reader)) is not None:
                self._perform(self._understood(frame))
        except (HiveError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            message = error.message if isinstance(error, HiveError) else f"{type(error).__name__}: {error}"
            _log.warning("worker_frame_refused", pid=self._pid, error=message)
            self.kill_now(ExitKind.POLICY, f"the worker said something it may not: {message}")

    def _perform(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            _log.exception("worker_handler_failed", pid=self._pid)
            self.kill_now(ExitKind.CRASH, f"the node could not take what the worker said: {error}")

    def _understood(self, frame: Frame) -> Callable[[], None]:
        """What a frame asks for, checked. Raises for whatever a worker must not say."""
        header = frame.header
        match header["kind"]:
            case "pong":
                return partial(self.heard, asyncio.get_running_loop().time())
            case "ready":
                return self._handler.on_ready
            case "progress":
                return partial(self._handler.on_progress, documents.decode(Progress, frame.body))
            case "checkpoint":
                folder = self._inside(header["folder"], self._workspace.checkpoint_dir)
                return partial(self._handler.on_checkpoint, folder, int(header["step"]), int(header["samples"]))
            case "artifact":
                path = self._inside(header["path"], self._workspace.output_dir, self._workspace.checkpoint_dir)
                return partial(self._handler.on_artifact, check_path(header["name"]), path)
            case "store":
                return partial(self._store_call, int(header["call"]), _StoreCall.of(frame))
            case "outcome":
                return partial(self._ended, documents.decode(Outcome, frame.body))
            case other:
                raise SpecError(f"unknown frame {str(other)[:100]!r}")

    def _ended(self, outcome: Outcome) -> None:
        self._tell(Frame({"kind": "over"}))
        self._outcome = outcome

    def _inside(self, path: str, *folders: Path) -> Path:
        """A file the worker may have sent to the coordinator: one it wrote, not one of the owner's."""
        resolved = Path(path).resolve()
        if not any(resolved.is_relative_to(folder.resolve()) for folder in folders):
            raise SpecError(f"{path[:200]} is outside the task's folders")
        return resolved

    def _store_call(self, number: int, call: _StoreCall) -> None:
        if len(self._store_calls) >= MAX_OPEN_STORE_CALLS:
            self._reply(number, StoreResult("refused", message=f"more than {MAX_OPEN_STORE_CALLS} calls at once"))
            return
        task = asyncio.create_task(self._ask(number, call))
        self._store_calls.add(task)
        task.add_done_callback(self._store_calls.discard)

    async def _ask(self, number: int, call: _StoreCall) -> None:
        try:
            async with asyncio.timeout(call.timeout_s + 1.0):  # the handler keeps the deadline; this only bounds it
                answer: StoreAnswer = await self._handler.on_store_call(
                    call.operation, call.keys, call.value, call.expected, call.amount, call.timeout_s
                )
        except (TimeoutError, DeadlineExceeded):
            answer = StoreResult("timeout")
        except NotFound as error:
            answer = StoreResult("missing", message=error.message)
        except Conflict as error:
            answer = StoreResult("refused", message=error.message)
        except Exception as error:
            _log.warning("store_call_failed", pid=self._pid, error=str(error))
            answer = StoreResult("refused", message=str(error)[:500])
        self._reply(number, answer)

    def _reply(self, call: int, answer: StoreAnswer) -> None:
        header: dict[str, Any] = {"kind": "reply", "call": call, "status": answer.status}
        self._tell(Frame(header | {"number": answer.number, "message": answer.message}, answer.value))

    async def _read_output(self) -> None:
        """Line by line; a worker that prints faster than this reads waits in its own print."""
        loop = asyncio.get_running_loop()
        splitter = LineSplitter()
        reader = asyncio.StreamReader(limit=_LOG_READ_BYTES)
        pipe = os.fdopen(self._output, "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            while content := await reader.read(_LOG_READ_BYTES):
                self._lines(splitter.feed(content))
        finally:
            self._lines(splitter.finish())
            transport.close()

    def _lines(self, lines: list[str]) -> None:
        if lines:
            self._last_lines.extend(lines)
            self._handler.on_log(lines)
