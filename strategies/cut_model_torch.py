"""What engines of ranks that cut single tensors have in common: a model built without memory for it, this rank's parts
with their optimizer, and everything that is done by name and box (strategies/extent.py): checkpoints, the model's file.

How the parts meet in a step is the engine's own (Sharded, TensorParallel). Invariant: every rank holds a part of the
training state, and what is not cut is whole and equal on all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from strategies.batches_torch import MicroBatch, StepBatch, micro_batch, read, to_device
from strategies.checkpoint_torch import TrainingState
from strategies.context import TaskContext
from strategies.data.dataset import Dataset
from strategies.evaluate_torch import Score
from strategies.extent import Extent
from strategies.group_torch import Group, single
from strategies.held_parts_torch import HeldParts, Part, chunk_of, scale_to
from strategies.hollow_model_torch import build_hollow, named_tensors
from strategies.initial_values_torch import initial_parts
from strategies.loss_torch import Loss
from strategies.model_file_torch import write_whole_model
from strategies.norm_statistics_torch import NormStatistics
from strategies.passes_torch import Passes, check_device, score_of
from strategies.recompute_torch import recompute_blocks


class CutModel(ABC):
    """Engine of all ranks of a group. Made before the group is connected; unusable until `connected`."""

    def __init__(self, context: TaskContext, loss: Loss, device: torch.device) -> None:
        """Builds the model without memory for it. Raises SpecError, UserCodeError."""
        workspace, spec = context.workspace, context.task.spec
        self._context = context
        self._loss = loss
        self._device = device
        self.module = build_hollow(spec.model, workspace.code_dir, workspace.weights_path, spec.train.seed)
        self._passes = Passes(self.module, loss, spec.train.precision, device)
        self._group = single()
        self._squared_norm = 0.0
        self._distributed: dict[str, DTensor] = {}  # parameters as the model sees them

    def _take_parts(self, dimensions: Mapping[str, int]) -> None:
        """This rank's boxes of the initial values: tensors named in `dimensions` are cut along those. Raises Exhausted
        for a full disk."""
        task = self._context.task
        if task.layout is not None and task.layout.checkpoint_activations:
            recompute_blocks(self.module)
        named = named_tensors(self.module)
        self._aliases = named.aliases
        self._cut = {name: dimensions[name] for name in named.tensors if name in dimensions}
        shapes = {name: tuple(tensor.shape) for name, tensor in named.tensors.items()}
        self._extents = {
            name: chunk_of(shape, self._cut[name], task.rank, task.world_size)
            if name in self._cut
            else Extent.whole(shape)
            for name, shape in shapes.items()
        }
        self._values = initial_parts(task.spec, self._context.workspace, self._extents)

    def connected(self, context: TaskContext, group: Group) -> None:
        """Cuts the model over the group, whose ranks all call it. Raises PeerLost, SpecError."""
        check_device(self._device, group)
        self._group = group
        parts = self._divide(init_device_mesh(group.device.type, (group.world_size,)))
        self._held = HeldParts(parts, self._aliases, context.task.spec.train.optimizer)
        self._norms = NormStatistics(self.module)
        self.module.train()

    @abstractmethod
    def _divide(self, mesh: DeviceMesh) -> dict[str, Part]:
        """Makes the model compute with the parts in `_values`; each under its name, in the order of the state dict."""

    @abstractmethod
    def gradients(self, batch: StepBatch) -> Tensor:
        """As Engine says."""

    @abstractmethod
    def _count(self, dataset: Dataset, total: Tensor) -> None:
        """Adds what this rank answers for to (loss, items, right answers, answers)."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._held.optimizer

    @property
    def holds(self) -> tuple[str, ...]:
        return ()

    @property
    def part(self) -> tuple[int, int]:
        return self._context.task.rank, self._context.task.world_size

    @property
    def keeps(self) -> bool:
        return True

    @property
    def parameter_bytes(self) -> int:
        """Of what this rank holds between two steps."""
        return self._held.parameter_bytes

    def clip(self, norm: float) -> None:
        scale_to(self._gradients(), self._squared_norm**0.5, norm)

    def undo(self) -> None:
        self._norms.undo()

    def evaluate(self, dataset: Dataset) -> Score:
        total = torch.zeros(4, dtype=torch.float64, device=self._device)
        self.module.eval()
        try:
            with torch.no_grad():
                self._count(dataset, total)
        finally:
            self.module.train()
        shared = total.to(self._group.device)
        self._group.all_reduce(shared)
        return score_of(shared)

    def state(self) -> Mapping[str, Tensor]:
        return self._held.state()

    def extents(self) -> Mapping[str, Extent]:
        return self._held.extents()

    def capture(self, step: int, samples: int, epoch: int, copy: bool) -> TrainingState:
        fence, (part, parts) = int(self._context.task.fence), self.part
        return self._held.capture(TrainingState(step, samples, epoch, {}, {}, {}, {}, {}, fence, part, parts), copy)

    def restore(self, state: TrainingState) -> None:
        self._held.restore(state)
        self._norms.settle()

    def write_model(self, path: Path) -> bool:
        return write_whole_model(path, self._group, self.state(), self.extents(), self._aliases)

    def _piece(self, dataset: Dataset, first: int, last: int) -> MicroBatch:
        """Rows of a split, on the device."""
        rows = np.arange(first, last, dtype=np.int64)
        return to_device(micro_batch(read(dataset, rows), self._loss, torch.device("cpu")), self._device)

    def _forget_gradients(self) -> None:
        for parameter in [*self._distributed.values(), *self._held.trainable.values()]:
            parameter.grad = None

    def _gradients(self) -> list[Tensor]:
        return [local.grad for local in self._held.trainable.values() if local.grad is not None]

    def _mean(self, loss: float, squared_norm: float, share: float) -> Tensor:
        """The loss of a step whose gradients are summed over the ranks, which had `share` of the nominal items: with
        ignored targets the mean is over fewer."""
        if abs(share - 1.0) > 1e-6 and share > 0:
            torch._foreach_div_(self._gradients(), share)
            loss, squared_norm = loss / share, squared_norm / share**2
        self._squared_norm = squared_norm
        return torch.tensor(loss, dtype=torch.float32)
