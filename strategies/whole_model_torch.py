"""Engine of ranks that each hold the whole model: one of them alone, or several that average their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from protos.jobspec import TrainSpec
from protos.plan import Layout
from strategies import checkpoint_torch
from strategies.batches_torch import StepBatch
from strategies.checkpoint_torch import TrainingState
from strategies.codecs_torch import codec
from strategies.context import TaskContext
from strategies.data.dataset import Dataset
from strategies.data_parallel_torch import GradientSync
from strategies.evaluate_torch import Score, evaluate
from strategies.extent import Extent
from strategies.forward_torch import Forward, of_backward
from strategies.group_torch import Group
from strategies.loss_torch import Loss
from strategies.model_torch import build
from strategies.optimizer_torch import build_optimizer, named_trainable
from strategies.recompute_torch import recompute_blocks
from strategies.single_node_torch import LocalSync, Sync


class WholeModel:
    """Engine. The group may be connected after this is made, and before `connected`."""

    def __init__(self, model: nn.Module, train: TrainSpec, loss: Loss, device: torch.device) -> None:
        self.model = model.to(device)
        self.optimizer = build_optimizer(train.optimizer, model)
        self._loss = loss
        self._forward = Forward(model, train.precision, device)
        self._device = device
        self._parameters = list(named_trainable(model).values())
        self._group = Group(0, 1, torch.device("cpu"))
        self._sync: Sync = LocalSync(self.optimizer)
        self._samples: tuple[int, ...] = ()
        self._rows = 1

    @classmethod
    def of(cls, context: TaskContext, loss: Loss, device: torch.device) -> WholeModel:
        """The user's model with its initial weights."""
        workspace, spec = context.workspace, context.task.spec
        model = build(spec.model, workspace.code_dir, workspace.weights_path, spec.train.seed)
        if _recomputes(context.task.layout):
            recompute_blocks(model)
        return cls(model, spec.train, loss, device)

    def connected(self, context: TaskContext, group: Group) -> None:
        task = context.task
        self._group = group
        self._samples = task.samples
        self._rows = max(task.samples[task.rank] // max(task.accumulate, 1), 1)
        if task.world_size > 1:
            self._sync = GradientSync(self.model, group, codec(task.compression))
        self.model.train()

    @property
    def holds(self) -> tuple[str, ...]:
        return ()

    @property
    def part(self) -> tuple[int, int]:
        return 0, 1

    @property
    def keeps(self) -> bool:
        return self._group.rank == 0

    def gradients(self, batch: StepBatch) -> Tensor:
        self._sync.begin(batch.share)
        last = len(batch.micro_batches) - 1
        for number, piece in enumerate(batch.micro_batches):
            loss = self._loss(self._forward(piece), piece.target)
            try:
                self._sync.backward(loss, batch.nominal_items, last=number == last)
            except RuntimeError as error:
                fault = of_backward(error)
                raise fault from fault.__cause__
        return self._sync.finish()

    def clip(self, norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, norm)

    def undo(self) -> None:
        self._sync.undo()

    def evaluate(self, dataset: Dataset) -> Score:
        return evaluate(
            self.model, self._forward, dataset, self._loss, self._group, self._samples, self._rows, self._device
        )

    def state(self) -> Mapping[str, Tensor]:
        return self.model.state_dict()

    def extents(self) -> Mapping[str, Extent]:
        return {}

    def capture(self, step: int, samples: int, epoch: int, copy: bool) -> TrainingState:
        return checkpoint_torch.capture(self.model, self.optimizer, step, samples, epoch, copy)

    def restore(self, state: TrainingState) -> None:
        checkpoint_torch.restore(state, self.model, self.optimizer)

    def write_model(self, path: Path) -> bool:
        if self._group.rank:
            return False
        checkpoint_torch.write_model(path, self.model)
        return True


def _recomputes(layout: Layout | None) -> bool:
    return layout is not None and layout.checkpoint_activations
