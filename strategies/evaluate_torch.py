"""Loss and accuracy on the test split, its rows shared among the ranks in proportion to their slices.

Sums and counts are all-reduced, so the figures are those of one machine. Gradients are off, the module is in eval mode
while it runs and in its former mode after it. Ranks meet every few seconds until all are through: however much slower
one of them is, the others never wait for more than a piece of its rows, and a broken group shows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from strategies.batches_torch import MicroBatch, micro_batch, read, to_device
from strategies.data.dataset import Dataset
from strategies.group_torch import Group
from strategies.loss_torch import Loss
from strategies.sample_order import slice_of

MEET_EVERY_S = 2.0
Forward = Callable[[MicroBatch], Any]


@dataclass(frozen=True, slots=True)
class Score:
    loss: float
    accuracy: float | None  # None for losses that do not classify


def evaluate(
    model: nn.Module,
    forward: Forward,
    dataset: Dataset,
    loss: Loss,
    group: Group,
    samples: tuple[int, ...],
    batch_rows: int,
    device: torch.device,
) -> Score:
    """Over all rows of `dataset`, at most `batch_rows` at a time on this rank."""
    start, stop = slice_of(dataset.rows, samples, group.rank)
    total = torch.zeros(4, dtype=torch.float64, device=device)  # loss, items, right answers, answers
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            first, left = start, 1.0
            while left:
                meet_at = group.clock() + MEET_EVERY_S
                while first < stop and group.clock() < meet_at:
                    last = min(first + batch_rows, stop)
                    _count(total, forward, dataset, first, last, loss, device)
                    first = last
                shared = torch.cat([total, total.new_tensor([float(stop - first)])]).to(group.device)
                group.all_reduce(shared)
                loss_sum, items, right, answered, left = shared.tolist()
    finally:
        model.train(training)
    return Score(loss_sum / max(items, 1.0), right / answered if answered else None)


def _count(
    total: torch.Tensor, forward: Forward, dataset: Dataset, first: int, last: int, loss: Loss, device: torch.device
) -> None:
    """Adds what the model makes of some rows."""
    batch = micro_batch(read(dataset, np.arange(first, last, dtype=np.int64)), loss, torch.device("cpu"))
    piece = to_device(batch, device)
    output = forward(piece)
    total[0] += loss(output, piece.target).double()
    total[1] += batch.items
    answers = loss.correct(output, piece.target)
    if answers is not None:
        total[2] += answers[0].double()
        total[3] += answers[1]
