"""Short tasks outside any job's group: identify a model, measure this machine. One worker each, one answer each.

A few at a time: twenty jobs submitted at once must not fill this machine with twenty models. Invariant: an errand that
is cancelled, or whose time is up, leaves no worker behind.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from node.exit_report import ExitKind, ExitReport
from node.faults import CannotWork
from node.runner import Runner
from node.worker_handle import StoreAnswer, StoreResult
from node.workspace import Workspaces
from protos.errors import Blame, HiveError
from protos.states import AttemptState, Reason
from protos.work import Fault, Outcome, Progress, Task, TaskKind

_AT_ONCE = 2
_LINES_KEPT = 20


class Errands:
    def __init__(self, runner: Runner, workspaces: Workspaces, node_name: str) -> None:
        self._runner = runner
        self._workspaces = workspaces
        self._node_name = node_name
        self._numbers = itertools.count(1)
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._asked: dict[int, asyncio.Task[None]] = {}

    def asked(self, call_id: int, errand: asyncio.Task[None]) -> None:
        """Somebody waits for this errand under a number, by which it can be cancelled."""
        self._asked[call_id] = errand

        def over(errand: asyncio.Task[None]) -> None:
            if self._asked.get(call_id) is errand:
                del self._asked[call_id]

        errand.add_done_callback(over)

    def cancel(self, call_id: int) -> None:
        """Nobody waits for the answer any more. One that is over already is no error."""
        errand = self._asked.get(call_id)
        if errand is not None:
            errand.cancel()

    def cancel_all(self) -> None:
        for call_id in list(self._asked):
            self.cancel(call_id)

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
                alone = len(self._runner.workers) == 1
                await asyncio.wait({ending.report}, timeout=_limit_s(task))
                if not ending.report.done():
                    alone = alone and len(self._runner.workers) == 1
                    await handle.kill(ExitKind.TIME, "its time was up")
                    if not ending.report.done() or ending.report.result().outcome is None:
                        return self._overrun(task, ending, alone)
                return _with_output(ending.report.result().final_outcome(), ending.lines)
            except asyncio.CancelledError:
                await handle.kill()
                raise
        finally:
            self._workspaces.close_attempt(task, suffix)

    def _overrun(self, task: Task, ending: _Ending, alone: bool) -> Outcome:
        """On a machine that did nothing else it is the code's doing; else it may be asked once more, elsewhere."""
        message = f"{task.spec.model.source} (or the data function) did not finish within {task.deadline_s:.0f} s"
        hint = "look for an endless loop or a download in it; hive logs JOB shows where it was"
        fault = Fault(
            Reason.MODEL_UNUSABLE,
            Blame.USER_CODE,
            f"{message} on {self._node_name}",
            hint,
            retryable=not alone,
            last_lines=tuple(ending.lines),
        )
        return Outcome(AttemptState.FAILED, fault=fault)


def _limit_s(task: Task) -> float | None:
    """Of a task that runs a stranger's code; the machine's own measurement takes what it takes."""
    return task.deadline_s if task.kind is TaskKind.IDENTIFY else None


def _with_output(outcome: Outcome, lines: Iterable[str]) -> Outcome:
    """What the worker printed, before the traceback that its fault may have."""
    fault = outcome.fault
    if fault is None:
        return outcome
    printed = tuple(lines)
    if fault.last_lines[-len(printed) :] != printed:  # else it has them already: the process ended without a word
        printed += fault.last_lines
    return replace(outcome, fault=replace(fault, last_lines=printed))


class _Ending:
    """node.worker_handle.WorkerHandler for which the end counts, and the last lines before it."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=_LINES_KEPT)
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
        self.lines.extend(lines)

    def on_exit(self, report: ExitReport) -> None:
        if not self.report.done():
            self.report.set_result(report)
