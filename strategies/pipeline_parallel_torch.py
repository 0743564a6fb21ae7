"""Engine of a pipeline: every rank holds one stage of the model, replicas of a stage average their gradients.

All stages of a replica read the same slice of each global batch; the first uses its features, the last its targets.
Ranks are numbered replica * stages + stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from protos.plan import Layout
from protos.work import Task
from strategies import checkpoint_torch
from strategies.batches_torch import MicroBatch, StepBatch, micro_batch, read, to_device
from strategies.checkpoint_torch import TrainingState
from strategies.context import TaskContext
from strategies.data.dataset import Dataset
from strategies.evaluate_torch import Score
from strategies.extent import Extent
from strategies.group_torch import Group
from strategies.heap import return_large_blocks
from strategies.loss_torch import Loss
from strategies.model_file_torch import write_whole_model
from strategies.optimizer_torch import build_optimizer
from strategies.sample_order import slice_of
from strategies.split_torch import StageSpec, build_part, cut, stage_module, tied, trace_job
from strategies.stage_schedule_torch import StageRunner
from strategies.stage_sync_torch import StageSync

LARGE_WEIGHT_BYTES = 4 * 1024 * 1024  # among the activations of micro-batches such gradients tear the heap apart
EVALUATION_PIECES = 4  # micro-batches that are under way at once while evaluating


class PipelineStages:
    """Engine. Made in two halves: the stage is cut and built before the group exists, connected after it does."""

    def __init__(self, context: TaskContext, loss: Loss, dataset: Dataset, device: torch.device) -> None:
        task, workspace = context.task, context.workspace
        assert task.layout is not None
        self._task: Task = task
        self._layout: Layout = task.layout
        self._loss = loss
        self._device = device
        self._stage = task.layout.stage_of(task.rank)
        self._replica = task.layout.replica_of(task.rank)
        rows = np.arange(2, dtype=np.int64) % max(dataset.rows, 1)
        example = micro_batch(read(dataset, rows), loss, torch.device("cpu")).features
        traced = trace_job(task.spec, workspace.code_dir, example, workspace.weights_path)
        self._specs = cut(traced, task.layout.cut_after)
        self._spec: StageSpec = self._specs[self._stage]
        return_large_blocks(self._spec.bytes, context.memory_bytes, LARGE_WEIGHT_BYTES)
        seed, scratch = task.spec.train.seed, workspace.output_dir
        initial = build_part(
            task.spec.model, workspace.code_dir, workspace.weights_path, seed, self._spec.names, scratch
        )
        self._module = stage_module(self._spec, initial, device)
        self._optimizer = build_optimizer(task.spec.train.optimizer, self._module)
        self._rows = max(1, -(-task.samples[self._replica] // max(task.accumulate, 1)))  # of a full micro-batch

    def connected(self, context: TaskContext, group: Group) -> None:
        """Every rank makes every subgroup, in one order."""
        stages, replicas = len(self._layout.stages), self._layout.replicas
        self._group = group
        pipes = [group.subgroup(range(r * stages, (r + 1) * stages)) for r in range(replicas)]
        of_stage: list[dist.ProcessGroup | None] = [None] * stages
        if replicas > 1:
            of_stage = [group.subgroup(range(s, stages * replicas, stages)) for s in range(stages)]
        shared: dict[str, dist.ProcessGroup] = {}
        by_stages: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        for name, holders in sorted(tied(self._specs).items()):
            if holders not in by_stages:
                by_stages[holders] = group.subgroup([r * stages + s for r in range(replicas) for s in holders])
            if (made := by_stages[holders]) is not None and self._stage in holders:
                shared[name] = made
        pipe = pipes[self._replica]
        assert pipe is not None
        half = self._task.spec.train.precision == "bf16"
        self._runner = StageRunner(self._spec, self._module, pipe, group, half, self._layout.schedule)
        self._sync = StageSync(group, self._module, of_stage[self._stage], shared)
        self._first_holder = {name: min(holders) for name, holders in tied(self._specs).items()}
        self._module.train()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    @property
    def holds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in self._spec.names))

    @property
    def part(self) -> tuple[int, int]:
        return self._stage, len(self._layout.stages)

    @property
    def keeps(self) -> bool:
        return self._replica == 0

    def gradients(self, batch: StepBatch) -> Tensor:
        self._sync.begin()
        losses: list[Tensor] = []

        def scaled(output: Any, target: Tensor) -> Tensor:
            value = self._loss(output, target) / batch.nominal_items
            losses.append(value.detach())
            return value

        for piece in batch.micro_batches:  # one, of all rows of the slice: the schedule cuts it
            inputs, target = self._given(piece)
            self._runner.train(piece.rows, self._rows, inputs, target, scaled)
        loss = float(sum(losses)) if losses else 0.0
        mean = self._sync.finish(loss, batch.share, self._runner.is_last)
        self._group.bytes_sent = self._group.sent_by_kernel()
        return mean

    def _given(self, piece: MicroBatch) -> tuple[list[Tensor], Tensor]:
        if isinstance(piece.features, dict):
            return [piece.features[name] for name in self._spec.features], piece.target
        return [piece.features], piece.target

    def clip(self, norm: float) -> None:
        """Tied weights and replicas are counted once."""
        own = [
            parameter.grad
            for name, parameter in self._module.named_parameters()
            if parameter.grad is not None and self._first_holder.get(name, self._stage) == self._stage
        ]
        squares = sum((gradient.double().pow(2).sum() for gradient in own), torch.zeros((), dtype=torch.float64))
        total = torch.as_tensor(squares if self._replica == 0 else 0.0, dtype=torch.float64).reshape(1)
        total = total.to(self._group.device)
        self._group.all_reduce(total)
        scale = min(1.0, norm / (float(total.sqrt()) + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        gradients = [parameter.grad for parameter in self._module.parameters() if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale)

    def undo(self) -> None:
        self._sync.undo()

    def evaluate(self, dataset: Dataset) -> Score:
        start, stop = slice_of(dataset.rows, self._task.samples, self._replica)
        total = torch.zeros(4, dtype=torch.float64)  # loss, items, right answers, answers

        def score(output: Any, target: Tensor) -> Tensor:
            value = self._loss(output, target)
            total[0] += value.double().cpu()
            total[1] += self._loss.items(target)
            if (answers := self._loss.correct(output, target)) is not None:
                total[2] += answers[0].double().cpu()
                total[3] += answers[1]
            return value

        self._module.eval()
        try:
            with torch.no_grad():
                for first in range(start, stop, self._rows * EVALUATION_PIECES):
                    last = min(first + self._rows * EVALUATION_PIECES, stop)
                    rows = read(dataset, np.arange(first, last, dtype=np.int64))
                    piece = to_device(micro_batch(rows, self._loss, torch.device("cpu")), self._device)
                    inputs, target = self._given(piece)
                    self._runner.evaluate(piece.rows, self._rows, inputs, target, score)
        finally:
            self._module.train()
        total = total.to(self._group.device)
        self._group.all_reduce(total)
        loss_sum, items, right, answered = total.tolist()
        return Score(loss_sum / max(items, 1.0), right / answered if answered else None)

    def state(self) -> Mapping[str, Tensor]:
        return self._module.state_dict()

    def extents(self) -> Mapping[str, Extent]:
        return {}

    def capture(self, step: int, samples: int, epoch: int, copy: bool) -> TrainingState:
        state = checkpoint_torch.capture(self._module, self._optimizer, step, samples, epoch, copy)
        part, parts = self.part
        return replace(state, fence=int(self._task.fence), part=part, parts=parts)

    def restore(self, state: TrainingState) -> None:
        own = self._module.state_dict()
        aliases = {alias: name for alias, name in state.aliases.items() if alias in own}
        checkpoint_torch.restore(replace(state, aliases=aliases), self._module, self._optimizer)
        self._sync.restored()

    def write_model(self, path: Path) -> bool:
        return write_whole_model(path, self._group, self.state(), {}, {})
