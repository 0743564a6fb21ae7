"""The seam between the training loop and a strategy: how the ranks of one plan make a step together, and what each of
them holds of the model.

The loop owns the order of steps, data, schedules, checkpoints and progress; an engine owns the model, the optimizer and
every collective inside a step. Names of tensors are those of the whole model's state dict, whatever a rank holds, so a
checkpoint of one engine is read by any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from strategies.batches_torch import StepBatch
from strategies.checkpoint_torch import TrainingState
from strategies.data.dataset import Dataset
from strategies.evaluate_torch import Score
from strategies.extent import Extent


class Engine(Protocol):
    """One per attempt, made once the group is connected. After `gradients` of every rank the step is sure to commit:
    nothing that can fail for lack of a peer comes between it and the optimizer."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def holds(self) -> tuple[str, ...]:
        """Names of the layers of this rank; empty when it holds all of them."""

    @property
    def part(self) -> tuple[int, int]:
        """Which part of how many this rank's state is, counted from 0: (0, 1) is the whole."""

    @property
    def keeps(self) -> bool:
        """Whether this rank is the one that writes its part at a periodic checkpoint: one of those that have it."""

    def gradients(self, batch: StepBatch) -> Tensor:
        """Leaves the mean gradient of the global batch in what this rank holds; the mean loss, equal on every rank.

        `batch` is this rank's (its replica's) slice. Raises PeerLost, UserCodeError and what the model raises.
        """

    def clip(self, norm: float) -> None:
        """Scales the gradient of the whole model to at most `norm`; every rank calls it."""

    def undo(self) -> None:
        """After a step that failed: buffers as they were at the last committed step."""

    def evaluate(self, dataset: Dataset) -> Score:
        """Over all rows; every rank calls it, and all get the same score."""

    def state(self) -> Mapping[str, Tensor]:
        """What this rank holds of the model's state dict: the live tensors; of a cut tensor its local part."""

    def extents(self) -> Mapping[str, Extent]:
        """Of those in `state` that are a part of a larger tensor."""

    def capture(self, step: int, samples: int, epoch: int, copy: bool) -> TrainingState:
        """This rank's part of the training state; `copy` when training goes on while it is written."""

    def restore(self, state: TrainingState) -> None:
        """What `extents` and `state` name, with the optimizer's state for it. Raises SpecError when it does not fit."""

    def write_model(self, path: Path) -> bool:
        """The whole model as one safetensors file, written by rank 0 (True there); every rank calls it."""
