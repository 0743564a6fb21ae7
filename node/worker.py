"""Inside a worker process: the channel of a task to its daemon, and the run of the task's entry function.

Owns one socket to the daemon. A reader thread answers pings, hands out stop requests and replies of the store. When the
socket ends the process ends at once: a worker never outlives its daemon. Everything said is in the kernel before a call
returns, so nothing is lost when the process then dies.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from node import channel
from node.channel import Frame
from node.exit_report import EXIT_BROKEN
from protos import documents, limits
from protos.errors import Blame, Conflict, DeadlineExceeded, ErrorCode, HiveError, NotFound, SpecError
from protos.states import AttemptState, Reason, StopMode
from protos.work import Fault, Outcome, Progress, Task
from strategies.context import KeyValueStore, TaskContext, Workspace

_MARGIN_S = 5.0  # for the daemon's answer, beyond a store call's own deadline, which the daemon keeps
_NO_DEADLINE_S = limits.CALL_DEADLINE_S * 4  # for calls that name none: enough for a coordinator's restart
MAX_TASK_BYTES = limits.MAX_MESSAGE_BYTES


class WorkerChannel:
    """strategies.context.Channel over the socket to the daemon."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._send_lock = threading.Lock()
        self._stop_lock = threading.Lock()
        self._stop: StopMode | None = None
        self._callbacks: list[Callable[[StopMode], None]] = []
        self._announced = 0  # checkpoints
        self._settled = 0  # of them, the daemon has done what it could
        self._over = threading.Event()
        self._store = ChannelStore(self._send)

    @property
    def store(self) -> KeyValueStore:
        return self._store

    def start(self) -> None:
        threading.Thread(target=self._read, name="hive-channel", daemon=True).start()

    def ready(self) -> None:
        self._send(Frame({"kind": "ready"}))

    def progress(self, progress: Progress) -> None:
        self._send(Frame({"kind": "progress"}, documents.encode(progress)))

    def checkpoint(self, folder: Path, step: int, samples: int) -> None:
        self._announced += 1
        self._send(Frame({"kind": "checkpoint", "folder": str(folder), "step": step, "samples": samples}))

    def uploading(self) -> bool:
        return self._announced > self._settled

    def artifact(self, name: str, path: Path) -> None:
        self._send(Frame({"kind": "artifact", "name": name, "path": str(path)}))

    def outcome(self, outcome: Outcome) -> None:
        """The last word. Waits until it was heard, bounded: the end of a socket that is still written to loses what
        the other side has not read yet."""
        self._send(Frame({"kind": "outcome"}, documents.encode(outcome)))
        self._over.wait(_MARGIN_S)

    def leave(self, outcome: Outcome) -> None:
        _flush()
        self.outcome(outcome)
        os._exit(0)

    def stop_requested(self) -> StopMode | None:
        return self._stop

    def on_stop(self, callback: Callable[[StopMode], None]) -> None:
        with self._stop_lock:
            mode = self._stop
            if mode is None:
                self._callbacks.append(callback)
        if mode is not None:
            _call_apart([callback], mode)

    def _send(self, frame: Frame) -> None:
        content = channel.pack(frame)
        try:
            with self._send_lock:
                self._connection.sendall(content)
        except OSError:
            os._exit(EXIT_BROKEN)

    def _read(self) -> None:
        try:
            while (frame := channel.receive_frame(self._connection)) is not None:
                match frame.header["kind"]:
                    case "ping":
                        self._send(Frame({"kind": "pong", "number": frame.header["number"]}))
                    case "stop":
                        self._stopped(StopMode(frame.header["mode"]))
                    case "settled":
                        self._settled += 1
                    case "over":
                        self._over.set()
                    case "reply":
                        self._store.answered(frame)
        finally:
            # The daemon is gone, or this thread can no longer hear it: nobody is left to work for.
            os._exit(EXIT_BROKEN)

    def _stopped(self, mode: StopMode) -> None:
        with self._stop_lock:
            self._stop = mode
            callbacks, self._callbacks = self._callbacks, []
        if callbacks:
            _call_apart(callbacks, mode)


def _call_apart(callbacks: Sequence[Callable[[StopMode], None]], mode: StopMode) -> None:
    """In a thread of its own: breaking a blocked collective may itself block, and pings must still be answered."""

    def call() -> None:
        for callback in callbacks:
            try:
                callback(mode)
            except Exception:
                traceback.print_exc()

    threading.Thread(target=call, name="hive-stop", daemon=True).start()


class ChannelStore:
    """strategies.context.KeyValueStore: each call is one frame out and one reply in; threads may call at once."""

    def __init__(self, send: Callable[[Frame], None]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[Frame]] = {}

    def set(self, key: str, value: bytes) -> None:
        self._call("set", [key], value)

    def get(self, key: str, timeout_s: float) -> bytes:
        return self._call("get", [key], timeout_s=timeout_s).body

    def add(self, key: str, amount: int) -> int:
        return int(self._call("add", [key], amount=amount).header["number"])

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._call("check", keys).header["number"])

    def wait(self, keys: Sequence[str], timeout_s: float) -> None:
        self._call("wait", keys, timeout_s=timeout_s)

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        return self._call("compare_set", [key], desired, expected).body

    def delete_key(self, key: str) -> bool:
        return bool(self._call("delete_key", [key]).header["number"])

    def num_keys(self) -> int:
        return int(self._call("num_keys", []).header["number"])

    def answered(self, frame: Frame) -> None:
        waiting = self._waiting.pop(int(frame.header["call"]), None)
        if waiting is not None:
            waiting.put(frame)

    def _call(
        self,
        operation: str,
        keys: Sequence[str],
        value: bytes = b"",
        expected: bytes = b"",
        *,
        amount: int = 0,
        timeout_s: float = _NO_DEADLINE_S,
    ) -> Frame:
        if max(len(value), len(expected)) > limits.MAX_STORE_VALUE_BYTES:
            raise SpecError(
                f"a store value over {limits.MAX_STORE_VALUE_BYTES} bytes", "the store is for rendezvous only"
            )
        number = next(self._numbers)
        reply: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._waiting[number] = reply
        header: dict[str, Any] = {"kind": "store", "call": number, "operation": operation, "keys": list(keys)}
        header |= {"amount": amount, "timeout_s": timeout_s, "value_bytes": len(value)}
        self._send(Frame(header, value + expected))
        try:
            frame = reply.get(timeout=timeout_s + _MARGIN_S)
        except queue.Empty:
            self._waiting.pop(number, None)
            raise _late(operation, keys, timeout_s) from None
        match frame.header["status"]:
            case "ok":
                return frame
            case "timeout":
                raise _late(operation, keys, timeout_s)
            case "missing":
                raise NotFound(f"the store has no {', '.join(keys)[:200]}")
            case _:
                raise Conflict(f"the store refused {operation}: {frame.header['message']}", code=ErrorCode.STALE_FENCE)


def _late(operation: str, keys: Sequence[str], timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"store {operation} of {', '.join(keys)[:200]} was not answered within {timeout_s:g} s",
        "another rank or the coordinator did not come in time",
    )


def receive_context(connection: socket.socket, link: WorkerChannel) -> TaskContext | None:
    """The first frame is the task and where it runs; None when the daemon is gone."""
    frame = channel.receive_frame(connection)
    if frame is None:
        return None
    header = frame.header
    return TaskContext(
        task=documents.decode(Task, frame.body, MAX_TASK_BYTES),
        workspace=documents.decode(Workspace, header["workspace"]),
        channel=link,
        interface=header["interface"],
        threads=header["threads"],
        device=header["device"],
        node_name=header["node_name"],
        memory_bytes=header["memory_bytes"],
        max_upload_bytes_per_s=header["max_upload_bytes_per_s"],
    )


def failure(error: BaseException) -> Outcome:
    """The outcome of an entry that raised instead of returning one."""
    reason, blame, hint = Reason.INTERNAL, Blame.NODE, "see the last lines of the log"
    if isinstance(error, HiveError):
        blame, hint = error.blame or Blame.NODE, error.hint
    elif isinstance(error, MemoryError):
        reason, hint = Reason.OUT_OF_MEMORY, "use a smaller batch, or grant more with --memory"
    message = error.message if isinstance(error, HiveError) else f"{type(error).__name__}: {error}"
    lines = traceback.format_exception(error)[-10:]
    fault = Fault(reason, blame, message[:2000], hint, last_lines=tuple("".join(lines).splitlines()[-20:]))
    return Outcome(AttemptState.FAILED, fault=fault)


def main(connection: socket.socket, entry: Callable[[TaskContext], Outcome]) -> int:
    """Runs the task to its outcome; the exit status."""
    link = WorkerChannel(connection)
    context = receive_context(connection, link)
    if context is None:
        return EXIT_BROKEN
    link.start()
    if torch := sys.modules.get("torch"):  # loaded by the entry, if at all: this file does not import it
        torch.set_num_threads(context.threads)
    try:
        outcome = entry(context)
    except BaseException as error:
        traceback.print_exc()
        outcome = failure(error)
    _flush()
    link.outcome(outcome)
    return 0


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
