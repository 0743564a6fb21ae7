"""Engine of ranks that cut single layers among them (tensor parallel): all see the whole batch, each has a part of the
columns or rows of the large matrices (strategies/tensor_plan_torch.py) with their gradients and optimizer state.

Parameters that are not cut are held whole and stay equal on all ranks: their gradients are averaged, as unlike machines
round differently. Random numbers are drawn alike: the seed of a step is rank 0's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication

from protos.errors import ErrorCode, HiveError, SpecError
from strategies.batches_torch import MicroBatch, StepBatch
from strategies.context import TaskContext
from strategies.cut_model_torch import CutModel
from strategies.data.dataset import Dataset
from strategies.held_parts_torch import Part, squared_norm
from strategies.hollow_model_torch import named_tensors, owner_of
from strategies.loss_torch import Loss
from strategies.tensor_layers_torch import attend_locally, cut_layers, whole
from strategies.tensor_plan_torch import derive


class TensorParallel(CutModel):
    """Engine of a group of `layout.tensor` ranks."""

    def __init__(self, context: TaskContext, loss: Loss, dataset: Dataset, device: torch.device) -> None:
        """Builds the model without memory for it, and this rank's part of the initial values. Raises SpecError when no
        layer can be cut, UserCodeError, Exhausted for a full disk."""
        task = context.task
        ranks = task.layout.tensor if task.layout is not None else task.world_size
        if ranks != task.world_size:
            raise SpecError(
                f"layers cut among {ranks} ranks cannot be repeated over a group of {task.world_size}",
                "use all ranks for it, or another strategy",
                code=ErrorCode.UNSUPPORTED,
            )
        super().__init__(context, loss, device)
        self.plan = derive(self.module, ranks)
        attend_locally(self.module)
        self._take_parts(self.plan.dimensions())
        self._rows = max(task.samples[0] // max(task.accumulate, 1), 1)

    def gradients(self, batch: StepBatch) -> Tensor:
        if batch.rows != batch.global_rows:
            raise HiveError(
                f"a rank that holds a part of every layer got {batch.rows} of {batch.global_rows} rows",
                "this is a mistake in hive: all ranks of a replica take its whole batch",
            )
        counted, sent = self._group.bytes_sent, self._group.sent_by_kernel()
        self._forget_gradients()
        self._draw_alike()
        value = torch.zeros((), dtype=torch.float64, device=self._device)
        for piece in batch.micro_batches:
            with implicit_replication():  # a plain tensor that meets a DTensor is equal on all ranks
                value += self._passes.backward(self._group, self._output(piece), piece, batch.nominal_items)
        self._collect()
        loss = self._settle(value, batch.share)
        unseen = self._group.sent_by_kernel() - sent - (self._group.bytes_sent - counted)
        self._group.run(max(unseen, 0), lambda: None)  # what the layers sent by themselves is counted and capped too
        return loss

    def _count(self, dataset: Dataset, total: Tensor) -> None:
        with implicit_replication():
            for first in range(0, dataset.rows, self._rows):
                piece = self._piece(dataset, first, min(first + self._rows, dataset.rows))
                output = self._output(piece)
                if not self._group.rank:  # all see the same rows
                    self._passes.count(total, output, piece)

    def _divide(self, mesh: DeviceMesh) -> dict[str, Part]:
        rows = {f"{pair.row}.bias" for pair in self.plan.pairs}
        parts: dict[str, Part] = {}
        for name, tensor in named_tensors(self.module).tensors.items():
            local = self._values.pop(name).to(self._device)
            if not isinstance(tensor, nn.Parameter):
                with torch.no_grad():
                    tensor.copy_(local)
                parts[name] = Part(tensor, self._extents[name])
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
            parts[name] = Part(held, self._extents[name])
            for each in (name, *(other for other, known in self._aliases.items() if known == name)):
                owner, leaf = owner_of(self.module, each)
                setattr(owner, leaf, made)
        self.module.to(self._device)  # buffers that the state dict does not name
        cut_layers(self.module, self.plan, mesh)
        return parts

    def _output(self, piece: MicroBatch) -> Any:
        """What the model returns, with plain tensors in it."""
        output = self._passes.output(self._group, piece)
        if isinstance(output, dict):
            return {name: whole(value) for name, value in output.items()}
        if type(output) in (tuple, list):
            return [whole(value) for value in output]
        return whole(output)

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
        return self._mean(loss, squared, share)


def _of_one_type(tensors: list[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())
