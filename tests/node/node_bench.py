"""What tests of the node's room share: tasks, a recording handler, and runners over real worker processes."""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

from node.exit_report import ExitReport
from node.runner import Runner
from node.worker_handle import StoreAnswer, StoreResult, WorkerHandle
from protos.errors import DeadlineExceeded
from protos.ids import Fence, JobId
from protos.jobspec import DataSpec, JobSpec, ModelSpec
from protos.work import Progress, Task, TaskKind
from strategies.context import Workspace

T = TypeVar("T")
DEADLINE_S = 30.0


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(DEADLINE_S * 2):
            return await coroutine

    return asyncio.run(bounded())


def make_task(what: str) -> Task:
    """A task whose entry is the function of that name in worker_entries.py."""
    spec = JobSpec(name="t", model=ModelSpec(source=f"{what}.py:build"), data=DataSpec(source="builtin:digits"))
    return Task(TaskKind.TRAIN, JobId("j-aaaaaaaa"), Fence(1), 0, 1, "single_node", spec, (32,))


class Recorder:
    """A WorkerHandler that notes everything in order and serves a store from a dict."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.lines: list[str] = []
        self.report: ExitReport | None = None
        self.ready = asyncio.Event()
        self.values: dict[str, bytes] = {}
        self.changed = asyncio.Event()

    def on_ready(self) -> None:
        self.calls.append(("ready",))
        self.ready.set()

    def on_progress(self, progress: Progress) -> None:
        self.calls.append(("progress", progress))

    def on_checkpoint(self, folder: Path, step: int, samples: int) -> None:
        self.calls.append(("checkpoint", folder, step, samples))

    def on_artifact(self, name: str, path: Path) -> None:
        self.calls.append(("artifact", name, path))

    def on_store_call(
        self, operation: str, keys: Sequence[str], value: bytes, expected: bytes, amount: int, timeout_s: float
    ) -> Awaitable[StoreAnswer]:
        return self._answer(operation, keys, value, expected, amount, timeout_s)

    async def _answer(
        self, operation: str, keys: Sequence[str], value: bytes, expected: bytes, amount: int, timeout_s: float
    ) -> StoreAnswer:
        match operation:
            case "set":
                self.values[keys[0]] = value
            case "add":
                self.values[keys[0]] = str(int(self.values.get(keys[0], b"0")) + amount).encode()
                return StoreResult(number=int(self.values[keys[0]]))
            case "check":
                return StoreResult(number=int(all(key in self.values for key in keys)))
            case "compare_set":
                if self.values.get(keys[0]) == expected:
                    self.values[keys[0]] = value
                return StoreResult(value=self.values[keys[0]])
            case "delete_key":
                return StoreResult(number=int(self.values.pop(keys[0], None) is not None))
            case "num_keys":
                return StoreResult(number=len(self.values))
            case "get" | "wait":
                if any(key not in self.values for key in keys):
                    raise DeadlineExceeded("nobody set it")
                return StoreResult(value=self.values[keys[0]] if operation == "get" else b"")
        return StoreResult()

    def on_log(self, lines: list[str]) -> None:
        assert self.report is None
        self.lines += lines
        self.changed.set()

    def on_exit(self, report: ExitReport) -> None:
        assert self.report is None, "on_exit was called twice"
        self.report = report

    async def line(self, start: str) -> str:
        while True:
            for line in self.lines:
                if line.startswith(start):
                    return line
            self.changed.clear()
            await self.changed.wait()


def wait_until_gone(pids: Iterable[int], timeout_s: float) -> list[int]:
    """Those of the processes that still run after the time. A process that ended but was not reaped is gone."""
    deadline = time.monotonic() + timeout_s
    left = []
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                left.append(pid)
        finally:
            os.close(pidfd)
    return left


class Bench:
    """A Runner with what a test needs to start tasks on it."""

    def __init__(self, runner: Runner, folder: Path) -> None:
        self.runner = runner
        self.folder = folder
        self.started = 0

    async def start(self, what: str, device: str = "cpu", upload: float | None = None) -> tuple[WorkerHandle, Recorder]:
        self.started += 1
        output = self.folder / f"out-{self.started}"
        output.mkdir()
        workspace = Workspace(None, None, None, None, self.folder / "checkpoints", output)
        recorder = Recorder()
        handle = await self.runner.start(make_task(what), workspace, "lo", 2, device, "node-a", recorder, None, upload)
        return handle, recorder

    async def finish(self, what: str, device: str = "cpu", upload: float | None = None) -> tuple[ExitReport, Recorder]:
        handle, recorder = await self.start(what, device, upload)
        async with asyncio.timeout(DEADLINE_S):
            report = await handle.wait()
        assert recorder.report is report
        return report, recorder


MakeBench = Callable[..., AbstractAsyncContextManager[Bench]]
