"""Progress on stderr: a bar per stage and epoch on a terminal, a line now and then in a pipe. stdout stays data."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Protocol, Self

import click

from coordinator.cli.progress import JobProgress
from coordinator.follow import EventRecord
from protos.command_line import paint
from protos.printable import printable

_LINE_EVERY_S = 5.0
_QUIET_STATES = ("", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLED")  # said by the bars and by the ending


class _Painter(Protocol):
    def say(self, sentence: str) -> None: ...
    def show(self, progress: JobProgress) -> None: ...
    def close(self) -> None: ...


class ProgressView:
    """Takes a job's events in order. `progress` is where the job is after the last one."""

    def __init__(self, job_id: str, start_seq: int = 0) -> None:
        self.progress = JobProgress(job_id, seq=start_seq)
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._painter: _Painter = _Bars() if terminal else _Lines()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._painter.close()

    def take(self, event: EventRecord) -> None:
        before, self.progress = self.progress, self.progress.after(event)
        if event.kind == "progress" and not event.payload.get("rank"):
            self._painter.show(self.progress)
        elif event.kind == "job" and _announced(self.progress) not in ("", _announced(before)):
            self._painter.say(printable(_announced(self.progress)))

    def say(self, sentence: str) -> None:
        self._painter.say(printable(sentence))


def _announced(progress: JobProgress) -> str:
    """queued: waiting for nodes"""
    if progress.state in _QUIET_STATES:
        return ""
    why = progress.message or ("" if progress.reason == "none" else progress.reason.replace("_", " "))
    return f"{progress.state.lower()}: {why}" if why else progress.state.lower()


class _Lines:
    def __init__(self) -> None:
        self._shown: JobProgress | None = None

    def say(self, sentence: str) -> None:
        click.echo(sentence, err=True)

    def show(self, progress: JobProgress) -> None:
        shown = self._shown
        if shown is None or shown.title != progress.title or progress.time - shown.time >= _LINE_EVERY_S:
            self._shown = progress
            steps = f"{progress.step}/{progress.steps_total}" if progress.steps_total else str(progress.step)
            click.echo(f"{progress.title}  step {steps}  {progress.figures}".rstrip(), err=True)

    def close(self) -> None:
        pass


class _Bars:
    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True, no_color=bool(os.environ.get("NO_COLOR")), highlight=False),
        )
        self._tasks: dict[str, TaskID] = {}
        self._title = ""
        self._bars.start()

    def say(self, sentence: str) -> None:
        self._bars.console.print(paint(sentence, "yellow", sys.stderr), markup=False)

    def show(self, progress: JobProgress) -> None:
        _, done, total = progress.epoch_steps or (0, progress.step, progress.steps_total or max(1, progress.step))
        if progress.title != self._title and self._title in self._tasks:
            last = self._tasks[self._title]
            self._bars.update(last, completed=self._bars.tasks[self._bars.task_ids.index(last)].total)
        self._title = progress.title
        if progress.title not in self._tasks:
            self._tasks[progress.title] = self._bars.add_task(progress.title, total=total, figures="")
        self._bars.update(self._tasks[progress.title], completed=done, total=total, figures=progress.figures)

    def close(self) -> None:
        self._bars.stop()
