"""Engine of ranks that cut single layers among them (tensor parallel): all see the whole batch, each has a part of the
columns or rows of the large matrices (strategies/tensor_plan_torch.py) with their gradients and optimizer state.

Parameters that are not cut are held whole and stay equal on all ranks: their gradients are averaged, as unlike machines
round differently. Random numbers are drawn alike: the seed of a step is rank 0's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication

from protos.errors import ErrorCode, HiveError, SpecError
from strategies.batches_torch import StepBatch, micro_batch, read, to_device
from strategies.checkpoint_torch import TrainingState
from strategies.context import TaskContext
from strategies.data.dataset import Dataset
from strategies.evaluate_torch import Score
from strategies.extent import Extent
from strategies.gather_model_torch import write_parts
from strategies.group_torch import Group, single
from strategies.held_parts_torch import HeldParts, Part, chunk_of, scale_to, squared_norm
from strategies.hollow_model_torch import build_hollow, named_tensors, owner_of
from strategies.initial_values_torch import initial_parts
from strategies.loss_torch import Loss
from strategies.norm_statistics_torch import NormStatistics
from strategies.passes_torch import Passes, check_device, score_of
from strategies.recompute_torch import recompute_blocks
from strategies.tensor_layers_torch import attend_locally, cut_layers, whole
from strategies.tensor_plan_torch import derive


class TensorParallel:
    """Engine of a group of `layout.tensor` ranks. Made before the group is connected; unusable until `connected`."""

    def __init__(self, context: TaskContext, loss: Loss, dataset: Dataset, device: torch.device) -> None:
        """Builds the model without memory for it, and this rank's part of the initial values. Raises SpecError when no
        layer can be cut, UserCodeError, Exhausted for a full disk."""
        task, workspace, spec = context.task, context.workspace, context.task.spec
        ranks = task.layout.tensor if task.layout is not None else task.world_size
        if ranks != task.world_size:
            raise SpecError(
                f"layers cut among {ranks} ranks cannot be repeated over a group of {task.world_size}",
                "use all ranks for it, or another strategy",
                code=ErrorCode.UNSUPPORTED,
            )
        self._context = context
        self._device = device
        self.module = build_hollow(spec.model, workspace.code_dir, workspace.weights_path, spec.train.seed)
        self.plan = derive(self.module, ranks)
        attend_locally(self.module)
        if task.layout is not None and task.layout.checkpoint_activations:
            recompute_blocks(self.module)
        named = named_tensors(self.module)
        dimensions = self.plan.dimensions()
        self._aliases = named.aliases
        self._cut = {name: dimensions[name] for name in named.tensors if name in dimensions}
        self._extents = {
            name: chunk_of(tuple(tensor.shape), self._cut[name], task.rank, ranks)
            if name in self._cut
            else Extent.whole(tuple(tensor.shape))
            for name, tensor in named.tensors.items()
        }
        self._values = initial_parts(spec, workspace, self._extents)
        self._rows = max(task.samples[0] // max(task.accumulate, 1), 1)
        self._passes = Passes(self.module, loss, spec.train.precision, self._device)
        self._loss = loss
        self._group = single()
        self._squared_norm = 0.0

    def connected(self, context: TaskContext, group: Group) -> None:
        """Cuts the layers over the group, whose ranks all call it. Raises PeerLost, SpecError."""
        check_device(self._device, group)
        self._group = group
        mesh = init_device_mesh(group.device.type, (group.world_size,))
        rows = {f"{pair.row}.bias" for pair in self.plan.pairs}
        parts: dict[str, Part] = {}
        self._distributed: dict[str, DTensor] = {}
        for name, tensor in named_tensors(self.module).tensors.items():
            local = self._values.pop(name).to(self._device)
            if not isinstance(tensor, nn.Parameter):
                with torch.no_grad():
                    tensor.copy_(local)
                parts[name] = Part(tensor, self._extents[name], None)
                continue
            held = nn.Parameter(local, requires_grad=tensor.requires_grad)
            made = held
            if name in self._cut or name in rows:
                placement = Shard(self._cut[name]) if name in self._cut else Replicate()
                made = nn.Parameter(
                    DTensor.from_local(
                        local, mesh, [placement], run_check=False, shape=tensor.shape, stride=tensor.stride()
                    ),
                    requires_grad=tensor.requires_grad,
                )
                self._distributed[name] = made  # type: ignore[assignment]
            parts[name] = Part(held, self._extents[name], self._cut.get(name))
            for each in (name, *(other for other, known in self._aliases.items() if known == name)):
                owner, leaf = owner_of(self.module, each)
                setattr(owner, leaf, made)
        self.module.to(self._device)  # buffers that the state dict does not name
        cut_layers(self.module, self.plan, mesh)
        self._held = HeldParts(parts, self._aliases, context.task.spec.train.optimizer)
        self._norms = NormStatistics(self.module)
        self.module.train()

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
        """Of what this rank holds."""
        return self._held.parameter_bytes

    def gradients(self, batch: StepBatch) -> Tensor:
        if batch.rows != batch.global_rows:
            raise HiveError(
                f"a rank that holds a part of every layer got {batch.rows} of {batch.global_rows} rows",
                "this is a mistake in hive: all ranks of a replica take its whole batch",
            )
        counted, sent = self._group.bytes_sent, self._group.sent_by_kernel()
        for parameter in [*self._distributed.values(), *self._held.trainable.values()]:
            parameter.grad = None
        self._draw_alike()
        value = torch.zeros((), dtype=torch.float64, device=self._device)
        for piece in batch.micro_batches:
            with implicit_replication():  # a plain tensor that meets a DTensor is equal on all ranks
                output = whole_output(self._passes.output(self._group, piece))
                value += self._passes.backward(self._group, output, piece, batch.nominal_items)
        self._collect()
        loss = self._settle(value, batch.share)
        unseen = self._group.sent_by_kernel() - sent - (self._group.bytes_sent - counted)
        self._group.run(max(unseen, 0), lambda: None)  # what the layers sent by themselves is counted and capped too
        return loss

    def clip(self, norm: float) -> None:
        scale_to(self._gradients(), self._squared_norm**0.5, norm)

    def undo(self) -> None:
        self._norms.undo()

    def evaluate(self, dataset: Dataset) -> Score:
        total = torch.zeros(4, dtype=torch.float64, device=self._device)  # loss, items, right answers, answers
        self.module.eval()
        try:
            with torch.no_grad(), implicit_replication():
                for first in range(0, dataset.rows, self._rows):
                    rows = np.arange(first, min(first + self._rows, dataset.rows), dtype=np.int64)
                    piece = to_device(micro_batch(read(dataset, rows), self._loss, torch.device("cpu")), self._device)
                    output = whole_output(self._passes.output(self._group, piece))
                    self._passes.count(total, output, piece)
        finally:
            self.module.train()
        shared = total.to(self._group.device)
        self._group.broadcast(shared, 0)
        return score_of(shared)

    def state(self) -> Mapping[str, Tensor]:
        return self._held.state()

    def extents(self) -> Mapping[str, Extent]:
        return self._held.extents()

    def capture(self, step: int, samples: int, epoch: int, copy: bool) -> TrainingState:
        task = self._context.task
        place = TrainingState(step, samples, epoch, {}, {}, {}, {}, {}, int(task.fence), task.rank, task.world_size)
        return self._held.capture(place, copy)

    def restore(self, state: TrainingState) -> None:
        self._held.restore(state)
        self._norms.settle()

    def write_model(self, path: Path) -> bool:
        return write_parts(path, self._group, self._held.parts, self._aliases)

    def _draw_alike(self) -> None:
        seed = torch.tensor([torch.initial_seed() & (2**63 - 1)], dtype=torch.int64, device=self._group.device)
        self._group.broadcast(seed, 0)
        torch.manual_seed(int(seed.item()))

    def _collect(self) -> None:
        """Gradients of cut layers as the optimizer sees them."""
        for name, parameter in self._distributed.items():
            if isinstance(parameter.grad, DTensor) and name in self._held.trainable:
                grad = parameter.grad.redistribute(placements=parameter.placements)
                self._held.trainable[name].grad = grad.to_local()
        for local in self._held.trainable.values():
            local.grad = whole(local.grad)

    def _settle(self, value: Tensor, share: float) -> Tensor:
        """Last collectives of a step: gradients of what every rank holds, the loss, the norm of the gradient."""
        trainable = self._held.trainable
        common = [local.grad for name, local in trainable.items() if name not in self._cut and local.grad is not None]
        for alike in _of_one_type(common):
            flat = torch.cat([grad.reshape(-1) for grad in alike]).to(self._group.device)
            self._group.all_reduce(flat)
            flat /= self._group.world_size
            for grad, piece in zip(alike, torch.split(flat, [grad.numel() for grad in alike]), strict=True):
                grad.copy_(piece.view_as(grad))
        own = [local.grad for name, local in trainable.items() if name in self._cut and local.grad is not None]
        statistics = self._norms.weighted(1.0 / self._group.world_size)
        numbers = torch.stack([value.cpu() / self._group.world_size, squared_norm(own)])
        tail = torch.cat([numbers, statistics]).to(self._group.device)
        self._group.all_reduce(tail)
        tail = tail.cpu()
        loss = float(tail[0])
        squared = float(tail[1]) + float(squared_norm(common))
        self._norms.commit(tail[2:], 1.0)
        if abs(share - 1.0) > 1e-6 and share > 0:  # ignored targets: the mean is over fewer items than nominal
            torch._foreach_div_(self._gradients(), share)
            loss, squared = loss / share, squared / share**2
        self._squared_norm = squared
        return torch.tensor(loss, dtype=torch.float32)

    def _gradients(self) -> list[Tensor]:
        return [local.grad for local in self._held.trainable.values() if local.grad is not None]


def whole_output(output: object) -> object:
    """What the model returns with plain tensors in it."""
    if isinstance(output, dict):
        return {name: whole(value) for name, value in output.items()}
    if type(output) in (tuple, list):
        return [whole(value) for value in output]  # type: ignore[attr-defined]
    return whole(output)


def _of_one_type(tensors: list[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())
