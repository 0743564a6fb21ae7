"""How far a job is, from its events: one pure step per event, and the words for it.

Invariant: time is taken from the events, never from a clock here, so that a replay shows what happened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from coordinator.follow import EventRecord
from protos.command_line import human_seconds
from protos.printable import printable

_SMOOTHING = 0.3  # weight of the newest interval in the speed


@dataclass(frozen=True, slots=True)
class JobProgress:
    """`steps_per_s` is smoothed; None until two progress events of one generation were seen."""

    job_id: str
    seq: int = 0
    time: float = 0.0
    state: str = ""
    reason: str = ""
    message: str = ""
    stage: str = ""
    step: int = 0
    steps_total: int | None = None
    epoch: int | None = None
    epochs_total: int | None = None
    samples: int = 0
    loss: float | None = None
    accuracy: float | None = None
    samples_per_s: float | None = None
    steps_per_s: float | None = None
    progress_time: float | None = None

    def after(self, event: EventRecord) -> JobProgress:
        """Where the job is once this event has happened. Events of other kinds only move `seq`."""
        here = replace(self, seq=event.seq, time=event.time)
        payload = event.payload
        match event.kind:
            case "job":
                moved = payload.get("state", self.state) != "RUNNING"
                return replace(
                    here,
                    state=payload.get("state", self.state),
                    reason=payload.get("reason") or "",
                    message=payload.get("message") or "",
                    progress_time=None if moved else self.progress_time,
                )
            case "progress" if not payload.get("rank"):
                return here._progressed(self, payload)
        return here

    def _progressed(self, before: JobProgress, payload: dict[str, Any]) -> JobProgress:
        step = int(payload.get("step") or 0)
        speed = before.steps_per_s
        if before.progress_time is not None and step > before.step and self.time > before.progress_time:
            newest = (step - before.step) / (self.time - before.progress_time)
            speed = newest if speed is None else (1 - _SMOOTHING) * speed + _SMOOTHING * newest
        return replace(
            self,
            stage=printable(payload.get("stage") or before.stage),
            step=step,
            steps_total=payload.get("steps_total") or before.steps_total,
            epoch=payload.get("epoch", before.epoch),
            epochs_total=payload.get("epochs_total") or before.epochs_total,
            samples=int(payload.get("samples") or before.samples),
            loss=_known(payload.get("loss"), before.loss),
            accuracy=_known(payload.get("accuracy"), before.accuracy),
            samples_per_s=_known(payload.get("samples_per_s"), before.samples_per_s),
            steps_per_s=speed,
            progress_time=self.time,
        )

    @property
    def eta_s(self) -> float | None:
        if self.steps_total is None or not self.steps_per_s:
            return None
        return max(0, self.steps_total - self.step) / self.steps_per_s

    @property
    def epoch_steps(self) -> tuple[int, int, int] | None:
        """(which epoch from 1, steps done in it, steps of it); None when the length is not known."""
        if not self.steps_total or not self.epochs_total:
            return None
        per_epoch = max(1, round(self.steps_total / self.epochs_total))
        which = min(self.epochs_total, max(1, -(-self.step // per_epoch)))
        return which, self.step - (which - 1) * per_epoch, per_epoch

    @property
    def title(self) -> str:
        """train epoch 2/5"""
        place = self.epoch_steps
        return f"{self.stage or 'train'} epoch {place[0]}/{self.epochs_total}" if place else self.stage or "train"

    @property
    def figures(self) -> str:
        """loss 0.31  accuracy 0.95  812 samples/s  4.0 s left"""
        parts = [
            None if self.loss is None else f"loss {self.loss:.4g}",
            None if self.accuracy is None else f"accuracy {self.accuracy:.4g}",
            None if self.samples_per_s is None else f"{self.samples_per_s:.0f} samples/s",
            None if self.eta_s is None else f"{human_seconds(self.eta_s)} left",
        ]
        return "  ".join(part for part in parts if part)


def _known(value: Any, before: float | None) -> float | None:
    return before if value is None else float(value)
