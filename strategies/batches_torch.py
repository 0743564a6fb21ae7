"""This rank's part of each global batch, as micro-batches of tensors ready for the model.

Owns the walk over epochs in sample order and two decisions taken from measured times. Where reading is quick, the rows
of several steps are read at once: between two steps of a model the caches are cold, and each call costs several times
what it does in a row. Where it costs a noticeable part of a step, a thread reads the next step ahead.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from protos.errors import ErrorCode, SpecError
from protos.work import Task
from strategies.data.dataset import Array, Batch, Dataset, Features, epoch_order
from strategies.faults_torch import DataUnusable
from strategies.loss_torch import Loss
from strategies.sample_order import EpochOrder, slice_of, steps

READ_AHEAD_SHARE = 0.05  # of a step's time spent reading, above which a thread reads ahead
READ_AHEAD_S = 1e-3
SETTLING_READS = 15
MANY_STEPS = 32  # read at once at most,
MANY_ROWS = 8192  # so many rows,
MANY_S = 4e-3  # and for so long: what a step may wait


class MicroBatch(NamedTuple):
    """`features` as the model takes them: one tensor, or tensors by argument name. A tuple: made in every step."""

    features: Tensor | dict[str, Tensor]
    target: Tensor
    rows: int
    items: int  # what the mean of the loss counts: rows, elements, or tokens that are not ignored


class StepBatch(NamedTuple):
    """`nominal_items`: items of the whole global batch if none were ignored; 0 on a rank whose slice is empty.

    `share`: this rank's real items over those.
    """

    micro_batches: tuple[MicroBatch, ...]
    epoch: int
    rows: int
    global_rows: int
    nominal_items: int
    share: float


@dataclass(frozen=True, slots=True)
class Slicing:
    """How global batches are cut: all ranks share everything but `rank` and `accumulate`."""

    batch_size: int
    samples: tuple[int, ...]
    rank: int
    accumulate: int
    seed: int
    shuffle: bool

    @classmethod
    def of(cls, task: Task) -> Slicing:
        """Of a rank. In a pipeline the slices are the replicas'; ranks that cut layers among them all see every row."""
        train, layout = task.spec.train, task.layout
        own, pieces = task.rank, task.accumulate
        if layout is not None and len(layout.stages) > 1:
            own, pieces = layout.replica_of(task.rank), 1  # the engine cuts the slice as its schedule needs it
        elif layout is not None and layout.tensor > 1:
            own = 0
        return cls(train.batch_size, task.samples, own, pieces, train.seed, train.shuffle)


class BatchSource:
    """Step batches in order from `next(step)`. Raises DataUnusable for rows that cannot be read."""

    def __init__(self, dataset: Dataset, slicing: Slicing, loss: Loss, device: torch.device, steps_total: int) -> None:
        self._dataset = dataset
        self._slicing = slicing
        self._loss = loss
        self._device = device
        self._steps_total = steps_total
        self._steps_per_epoch = steps(dataset.rows, slicing.batch_size)
        self._epoch = -1
        self._order: EpochOrder | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[list[StepBatch]]] | None = None
        self._ready: deque[StepBatch] = deque()
        self._ready_step = 0  # of the first one
        self._at_once = 1
        self._read_s: list[float] = []
        self._step_s: list[float] = []
        self._since = time.perf_counter()

    def next(self, step: int) -> StepBatch:
        if self._ready and self._ready_step == step:
            self._ready_step += 1
            return self._ready.popleft()
        if self._reader is None:
            started = time.perf_counter()
            batches = self._read(step, self._at_once)
            self._watch(started)
        else:
            ahead, self._ahead = self._ahead, None
            reading = ahead[1] if ahead and ahead[0] == step else self._reader.submit(self._read, step, 1)
            batches = reading.result()
            if step + 1 < self._steps_total:
                self._ahead = (step + 1, self._reader.submit(self._read, step + 1, 1))
        self._ready, self._ready_step = deque(batches[1:]), step + 1
        return batches[0]

    def global_rows(self, step: int) -> Array:
        """The rows of the whole batch of a step, of all ranks."""
        epoch, position = divmod(step, self._steps_per_epoch)
        order = epoch_order(self._dataset, self._slicing.seed, epoch, self._slicing.shuffle)
        return order.batch(position, self._slicing.batch_size)

    def close(self, wait: bool = False) -> None:
        """`wait`: until nobody reads the dataset any more."""
        if self._reader is not None:
            self._reader.shutdown(wait=wait, cancel_futures=True)

    def _watch(self, started: float) -> None:
        """After a read: more or fewer steps with the next one, or a thread that reads ahead."""
        now = time.perf_counter()
        took_s = now - started
        self._read_s.append(took_s)
        self._step_s.append(now - self._since)
        self._since = now
        if took_s < MANY_S / 2:
            self._at_once = min(2 * self._at_once, MANY_STEPS, max(MANY_ROWS // self._slicing.batch_size, 1))
        elif took_s > MANY_S:
            self._at_once = max(self._at_once // 2, 1)
        if len(self._read_s) == SETTLING_READS:
            read_s, step_s = median(self._read_s), median(self._step_s)
            if read_s > READ_AHEAD_S and read_s > READ_AHEAD_SHARE * step_s:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
            self._read_s, self._step_s = [], []

    def _read(self, step: int, count: int) -> list[StepBatch]:
        """This step and at most `count` - 1 after it, of the same epoch."""
        slicing = self._slicing
        epoch, position = divmod(step, self._steps_per_epoch)
        if epoch != self._epoch or self._order is None:
            self._order = epoch_order(self._dataset, slicing.seed, epoch, slicing.shuffle)
            self._epoch = epoch
        count = max(1, min(count, self._steps_per_epoch - position, self._steps_total - step))
        batches = [self._order.batch(position + number, slicing.batch_size) for number in range(count)]
        bounds = [slice_of(len(batch), slicing.samples, slicing.rank) for batch in batches]
        own = [batch[start:stop] for batch, (start, stop) in zip(batches, bounds, strict=True)]
        if not any(len(rows) for rows in own):
            return [StepBatch((), epoch, 0, len(batch), 0, 0.0) for batch in batches]
        whole = micro_batch(read(self._dataset, np.concatenate(own)), self._loss, torch.device("cpu"))
        per_row = self._loss.items_per_row(whole.target)
        found, first = [], 0
        for batch, rows in zip(batches, own, strict=True):
            found.append(self._step_batch(whole, (first, first + len(rows)), epoch, len(batch), per_row))
            first += len(rows)
        return found

    def _step_batch(
        self, whole: MicroBatch, own: tuple[int, int], epoch: int, global_rows: int, items_per_row: int
    ) -> StepBatch:
        """The rows [start, stop) of what was read, as micro-batches on the device."""
        start, stop = own
        if start == stop:
            return StepBatch((), epoch, 0, global_rows, 0, 0.0)
        pieces = cut(whole, bounds_of(start, stop, self._slicing.accumulate), self._loss)
        nominal = global_rows * items_per_row
        share = sum([piece.items for piece in pieces]) / nominal if nominal else 0.0
        on_device = tuple([to_device(piece, self._device) for piece in pieces])
        return StepBatch(on_device, epoch, stop - start, global_rows, nominal, share)


def read(dataset: Dataset, indices: Array) -> Batch:
    try:
        return dataset.batch(indices)
    except SpecError as error:
        raise DataUnusable("reading rows") from error


def micro_batch(batch: Batch, loss: Loss, device: torch.device) -> MicroBatch:
    """Without a target, text is learnt by predicting each next token, and any other loss compares with the features."""
    target: Tensor
    features: Tensor | dict[str, Tensor] = _tensors(batch.features)
    if batch.target is not None:
        target = torch.from_numpy(batch.target)
    elif isinstance(features, dict):
        raise DataUnusable("reading rows") from SpecError(
            f"{loss.name} needs a target and the data have none", "name it in data.target", code=ErrorCode.DATA_UNUSABLE
        )
    elif loss.name == "causal_lm":
        features, target = features[:, :-1], features[:, 1:]
    else:
        target = features
    micro = MicroBatch(features, target, len(target), loss.items(target))
    return to_device(micro, device)


def bounds_of(start: int, stop: int, pieces: int) -> list[int]:
    """Where contiguous pieces of nearly equal size begin and end: never more of them than there are rows."""
    pieces = max(1, min(pieces, stop - start))
    return [start + (stop - start) * number // pieces for number in range(pieces + 1)]


def cut(whole: MicroBatch, bounds: Sequence[int], loss: Loss) -> list[MicroBatch]:
    """The rows between each bound and the next."""
    found = []
    for start, stop in pairwise(bounds):
        target = whole.target[start:stop]
        features: Tensor | dict[str, Tensor]
        if isinstance(whole.features, dict):
            features = {name: tensor[start:stop] for name, tensor in whole.features.items()}
        else:
            features = whole.features[start:stop]
        found.append(MicroBatch(features, target, stop - start, loss.items(target)))
    return found


def to_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    if device.type == "cpu":
        return micro
    features: Tensor | dict[str, Tensor]
    if isinstance(micro.features, dict):
        features = {name: tensor.to(device, non_blocking=True) for name, tensor in micro.features.items()}
    else:
        features = micro.features.to(device, non_blocking=True)
    return MicroBatch(features, micro.target.to(device, non_blocking=True), micro.rows, micro.items)


def _tensors(features: Features) -> Any:
    if isinstance(features, Mapping):
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in features.items()}
    return torch.from_numpy(np.ascontiguousarray(features))
