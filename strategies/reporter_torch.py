"""Per-step records on their way to metrics.jsonl, at next to no cost per step.

Losses stay tensors until a report is due (a read would make a GPU wait), then all are read at once and checked: one
that is not finite raises NotANumber with its step. Rank 0 reports the records, the others only where they stand.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from protos.work import Metrics, Progress, StepTimes
from strategies.faults_torch import NotANumber

REPORT_EVERY_S = 0.5
STEP_TIMES_EVERY_S = 2.0
HALF_WINDOW = 10


@dataclass(frozen=True, slots=True)
class Totals:
    """Of the whole run; `epochs` None when its length is given in steps."""

    steps: int
    epochs: int | None


class _Record(NamedTuple):
    """Of one step. A tuple: made in every step."""

    time: float
    step: int
    epoch: int
    loss: Tensor
    learning_rate: float
    samples: int
    bytes_sent: int


class Convergence:
    """Relative decrease of the loss per step over a trailing window.

    With a and b the mean losses of the older and the newer half of the last 2*HALF_WINDOW steps, whose centres are
    HALF_WINDOW steps apart: (a - b) / (|a| * HALF_WINDOW). Positive while the loss falls; None until it is full.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=2 * HALF_WINDOW)

    def add(self, loss: float) -> float | None:
        self._losses.append(loss)
        if len(self._losses) < 2 * HALF_WINDOW:
            return None
        older, newer = sum(islice(self._losses, HALF_WINDOW)), sum(islice(self._losses, HALF_WINDOW, None))
        return (older - newer) / (abs(older) * HALF_WINDOW) if older else 0.0


class Reporter:
    """`step` after every committed step; `flush` before anything that relies on the losses having been finite."""

    def __init__(
        self,
        send: Callable[[Progress], None],
        totals: Totals,
        rank: int,
        node: str,
        samples: int,
        step_times: Callable[[], StepTimes | None] = lambda: None,
    ) -> None:
        """`step_times`: of this rank of a group, sent now and then."""
        self._send = send
        self._step_times = step_times
        self._times_at = time.perf_counter()
        self._totals = totals
        self._rank = rank
        self._node = node
        self._records: list[_Record] = []
        self._convergence = Convergence()
        self._reported_at = time.perf_counter()
        self._reported_samples = samples
        self._excluded_s = 0.0
        self.last_loss: float | None = None
        self._spent_s = 0.0
        self._spent_samples = 0

    @property
    def mean_rate(self) -> float | None:
        """Samples per second over the whole attempt, evaluations not counted."""
        return self._spent_samples / self._spent_s if self._spent_s else None

    def step(self, step: int, epoch: int, loss: Tensor, learning_rate: float, samples: int, bytes_sent: int) -> None:
        """`step` and `samples` count what is committed, this step included."""
        self._records.append(_Record(time.time(), step, epoch, loss, learning_rate, samples, bytes_sent))
        if time.perf_counter() - self._reported_at >= REPORT_EVERY_S or len(self._records) == 1 == step:
            self.flush()

    def evaluated(self, metrics: Metrics, started: float) -> None:
        """An evaluation that began at `started` (perf_counter): its time does not count as training."""
        self.flush()
        self._excluded_s += time.perf_counter() - started
        own = (metrics,) if self._rank == 0 else ()
        self._progress(own, metrics.step, metrics.epoch, "evaluate", metrics.samples)

    def flush(self) -> None:
        """Reads, checks and sends what has gathered. Raises NotANumber after sending the records before it."""
        records, self._records = self._records, []
        if not records:
            return
        now = time.perf_counter()
        elapsed_s = max(now - self._reported_at - self._excluded_s, 1e-9)
        gained = records[-1].samples - self._reported_samples
        rate = gained / elapsed_s
        self._spent_s += elapsed_s
        self._spent_samples += gained
        losses = torch.stack([record.loss for record in records]).tolist()
        self._reported_at, self._reported_samples, self._excluded_s = now, records[-1].samples, 0.0
        bad = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
        if bad:
            self.last_loss = losses[bad - 1]
            metrics = [
                self._metrics(record, loss, rate) for record, loss in zip(records[:bad], losses[:bad], strict=True)
            ]
            last = records[bad - 1]
            self._progress(tuple(metrics) if self._rank == 0 else (), last.step, last.epoch, "train", last.samples)
        if bad < len(losses):
            raise NotANumber(records[bad].step, records[bad].learning_rate, losses[bad])

    def _metrics(self, record: _Record, loss: float, rate: float) -> Metrics:
        return Metrics(
            record.time,
            record.step,
            record.epoch,
            "train",
            loss,
            record.samples,
            samples_per_s=rate,
            bytes_sent=record.bytes_sent,
            convergence_rate=self._convergence.add(loss),
            node=self._node,
            rank=self._rank,
        )

    def _progress(self, metrics: tuple[Metrics, ...], step: int, epoch: int, stage: str, samples: int) -> None:
        now, times = time.perf_counter(), None
        if now - self._times_at >= STEP_TIMES_EVERY_S and (times := self._step_times()) is not None:
            self._times_at = now
        self._send(Progress(metrics, step, self._totals.steps, epoch, self._totals.epochs, stage, samples, times))
