"""Short tasks outside any job's group: identify a model, measure this machine. One worker each, one answer each.

A few at a time: twenty jobs submitted at once must not fill this machine with twenty models.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path

from node.exit_report import ExitReport
from node.faults import CannotWork
from node.runner import Runner
from node.worker_handle import StoreAnswer, StoreResult
from node.workspace import Workspaces
from protos.errors import HiveError
from protos.work import Outcome, Progress, Task

_AT_ONCE = 2


class Errands:
    def __init__(self, runner: Runner, workspaces: Workspaces, node_name: str) -> None:
        self._runner = runner
        self._workspaces = workspaces
        self._node_name = node_name
        self._numbers = itertools.count(1)
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def run(self, task: Task, threads: int, device: str) -> Outcome:
        """Raises HiveError when the files cannot be had, CannotWork when no worker starts; a task that fails is an
        Outcome."""
        async with self._turns:
            return await self._run(task, threads, device)

    async def _run(self, task: Task, threads: int, device: str) -> Outcome:
        suffix = f"-{task.kind.value}-{next(self._numbers)}"
        try:
            workspace = await self._workspaces.prepare(task, suffix)
            ending = _Ending()
            try:
                handle = await self._runner.start(task, workspace, "", threads, device, self._node_name, ending)
            except HiveError as error:
                raise CannotWork.of(error) from None
            try:
                report = await ending.report
            except asyncio.CancelledError:
                await handle.kill()
                raise
            outcome = report.final_outcome()
            if outcome.fault is not None and report.last_lines and not outcome.fault.last_lines:
                outcome = replace(outcome, fault=replace(outcome.fault, last_lines=report.last_lines))
            return outcome
        finally:
            self._workspaces.close_attempt(task, suffix)


class _Ending:
    """node.worker_handle.WorkerHandler for which only the end counts."""

    def __init__(self) -> None:
        self.report: asyncio.Future[ExitReport] = asyncio.get_running_loop().create_future()

    def on_ready(self) -> None:
        pass

    def on_progress(self, progress: Progress) -> None:
        pass

    def on_checkpoint(self, folder: Path, step: int, samples: int) -> None:
        pass

    def on_artifact(self, name: str, path: Path) -> None:
        pass

    def on_store_call(
        self, operation: str, keys: Sequence[str], value: bytes, expected: bytes, amount: int, timeout_s: float
    ) -> Awaitable[StoreAnswer]:
        return self._no_group()

    async def _no_group(self) -> StoreAnswer:
        return StoreResult("refused", message="this task has no group")

    def on_log(self, lines: list[str]) -> None:
        pass

    def on_exit(self, report: ExitReport) -> None:
        if not self.report.done():
            self.report.set_result(report)
