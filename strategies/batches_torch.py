"""This rank's part of each global batch, as micro-batches of tensors ready for the model.

Owns the walk over epochs in sample order and the decision to read ahead: a thread prepares the next step only after
reading has been seen to cost a noticeable part of a step; for small data in memory the hand-over costs more.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protos.errors import ErrorCode, SpecError
from strategies.data.dataset import Array, Batch, Dataset, Features, epoch_order
from strategies.faults_torch import DataUnusable
from strategies.loss_torch import Loss
from strategies.sample_order import EpochOrder, slice_of, steps

READ_AHEAD_SHARE = 0.05  # of a step's time spent reading, above which a thread reads ahead
READ_AHEAD_S = 1e-3
SETTLING_STEPS = 15


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """`features` as the model takes them: one tensor, or tensors by argument name."""

    features: Tensor | dict[str, Tensor]
    target: Tensor
    rows: int
    items: int  # what the mean of the loss counts: rows, elements, or tokens that are not ignored


@dataclass(frozen=True, slots=True)
class StepBatch:
    """`nominal_items`: items of the whole global batch if none were ignored; 0 on a rank whose slice is empty."""

    micro_batches: tuple[MicroBatch, ...]
    epoch: int
    global_rows: int
    nominal_items: int

    @property
    def rows(self) -> int:
        return sum(micro.rows for micro in self.micro_batches)

    @property
    def share(self) -> float:
        """This rank's real items over the nominal items of the global batch."""
        if not self.nominal_items:
            return 0.0
        return sum(micro.items for micro in self.micro_batches) / self.nominal_items


@dataclass(frozen=True, slots=True)
class Slicing:
    """How global batches are cut: all ranks share everything but `rank` and `accumulate`."""

    batch_size: int
    samples: tuple[int, ...]
    rank: int
    accumulate: int
    seed: int
    shuffle: bool


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
        self._ahead: tuple[int, Future[StepBatch]] | None = None
        self._read_s: list[float] = []
        self._step_s: list[float] = []
        self._since = time.perf_counter()

    def next(self, step: int) -> StepBatch:
        if self._reader is None:
            started = time.perf_counter()
            batch = self._read(step)
            self._watch(started)
            return batch
        ahead, self._ahead = self._ahead, None
        batch = ahead[1].result() if ahead and ahead[0] == step else self._reader.submit(self._read, step).result()
        if step + 1 < self._steps_total:
            self._ahead = (step + 1, self._reader.submit(self._read, step + 1))
        return batch

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
        """Turns reading ahead on when the median read is slow, in itself and beside the median step."""
        now = time.perf_counter()
        self._read_s.append(now - started)
        self._step_s.append(now - self._since)
        self._since = now
        if len(self._read_s) == SETTLING_STEPS:
            read_s, step_s = median(self._read_s), median(self._step_s)
            if read_s > READ_AHEAD_S and read_s > READ_AHEAD_SHARE * step_s:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
            self._read_s, self._step_s = [], []

    def _read(self, step: int) -> StepBatch:
        slicing = self._slicing
        epoch, position = divmod(step, self._steps_per_epoch)
        if epoch != self._epoch or self._order is None:
            self._order = epoch_order(self._dataset, slicing.seed, epoch, slicing.shuffle)
            self._epoch = epoch
        indices = self._order.batch(position, slicing.batch_size)
        start, stop = slice_of(len(indices), slicing.samples, slicing.rank)
        if start == stop:
            return StepBatch((), epoch, len(indices), 0)
        whole = micro_batch(read(self._dataset, indices[start:stop]), self._loss, torch.device("cpu"))
        nominal = len(indices) * self._loss.items_per_row(whole.target)
        pieces = cut(whole, slicing.accumulate, self._loss)
        return StepBatch(tuple(to_device(piece, self._device) for piece in pieces), epoch, len(indices), nominal)


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


def cut(whole: MicroBatch, pieces: int, loss: Loss) -> list[MicroBatch]:
    """Contiguous pieces of nearly equal size, never more than there are rows."""
    pieces = max(1, min(pieces, whole.rows))
    if pieces == 1:
        return [whole]
    bounds = [whole.rows * number // pieces for number in range(pieces + 1)]
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
