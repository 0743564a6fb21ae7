"""Loss and accuracy on the test split, its rows shared among the ranks in proportion to their slices.

Sums and counts are all-reduced, so the figures are those of one machine. Gradients are off, the module is in eval mode
while it runs and in its former mode after it.
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
            for first in range(start, stop, batch_rows):
                indices = np.arange(first, min(first + batch_rows, stop), dtype=np.int64)
                batch = micro_batch(read(dataset, indices), loss, torch.device("cpu"))
                piece = to_device(batch, device)
                output = forward(piece)
                total[0] += loss(output, piece.target).double()
                total[1] += batch.items
                answers = loss.correct(output, piece.target)
                if answers is not None:
                    total[2] += answers[0].double()
                    total[3] += answers[1]
    finally:
        model.train(training)
    shared = total.to(group.device)
    group.all_reduce(shared)
    loss_sum, items, right, answered = shared.tolist()
    return Score(loss_sum / max(items, 1.0), right / answered if answered else None)
