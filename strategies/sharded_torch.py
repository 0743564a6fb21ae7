"""Engine of ranks that cut every parameter, gradient and optimizer state over all of them (torch's FSDP2).

Before a unit of the model runs its parameters are gathered, after it they are dropped; the backward pass sends each
rank the summed gradient of its part. Parts are equal (torch.chunk of dimension 0): a node with more memory takes more
ranks. The rows of a rank may be any number: each loss is divided by the size of the whole global batch and gradients
are summed. All ranks make the same number of passes; one with fewer micro-batches fills up with rows of weight zero.

Refuses a model that uses other parameters on one rank than on the others: the collectives would not meet.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from protos.errors import ErrorCode, SpecError
from strategies.batches_torch import MicroBatch, StepBatch, micro_batch, read, to_device
from strategies.context import TaskContext
from strategies.cut_model_torch import CutModel
from strategies.data.dataset import Dataset
from strategies.group_torch import Group
from strategies.heap import give_back, return_large_blocks
from strategies.held_parts_torch import Part, squared_norm
from strategies.hollow_model_torch import named_tensors, owner_of
from strategies.loss_torch import Loss
from strategies.sample_order import slice_of
from strategies.shard_collectives_torch import GroupAllGather, GroupReduceScatter
from strategies.shard_turns_torch import Turns
from strategies.shard_units_torch import units_of

EXAMPLE_ROWS = 2  # what a rank without rows computes on: batch norms want more than one


class Sharded(CutModel):
    """Engine of a group of at least two."""

    def __init__(self, context: TaskContext, loss: Loss, dataset: Dataset, device: torch.device) -> None:
        """Builds the model without memory for it, and this rank's part of the initial values. Raises SpecError,
        UserCodeError, DataUnusable, Exhausted for a full disk."""
        rows = read(dataset, np.arange(EXAMPLE_ROWS, dtype=np.int64) % max(dataset.rows, 1))
        example = micro_batch(rows, loss, torch.device("cpu"))
        self._example = to_device(example, device)
        super().__init__(context, loss, device)
        _check_types(self.module)
        return_large_blocks(sum(tensor.nbytes for tensor in self.module.parameters()), context.memory_bytes)
        self._units = units_of(self.module, example.features)
        parameters = self.module.named_parameters(remove_duplicate=False)
        self._take_parts({name: 0 for name, parameter in parameters if parameter.ndim})  # buffers are held by all

    def connected(self, context: TaskContext, group: Group) -> None:
        task = context.task
        torch.set_autocast_cache_enabled(False)  # it would keep a copy of every unit that was gathered
        super().connected(context, group)
        self._whole = [local for name, local in self._held.trainable.items() if name not in self._distributed]
        give_back()
        own = torch.tensor([task.accumulate], dtype=torch.int64, device=group.device)
        self._turns = Turns(task.samples, tuple(int(each.item()) for each in group.all_gather(own)))

    def gradients(self, batch: StepBatch) -> Tensor:
        self._forget_gradients()
        value = torch.zeros((), dtype=torch.float64, device=self._device)
        for piece in batch.micro_batches:
            value += self._backward(piece, batch.nominal_items)
        missing = self._turns.of_step(batch.global_rows) - len(batch.micro_batches)
        if missing > 0:
            statistics = self._norms.now()
            for _ in range(missing):
                self._backward(self._example, None)
            self._norms.put_back(statistics)
        for name, cut in self._distributed.items():
            if isinstance(cut.grad, DTensor):
                self._held.trainable[name].grad = cut.grad.to_local()
        return self._settle(value, batch.share)

    def _count(self, dataset: Dataset, total: Tensor) -> None:
        rank = self._group.rank
        start, stop = slice_of(dataset.rows, self._turns.samples, rank)
        at_once = self._turns.rows_at_once(rank)
        for turn in range(self._turns.of_evaluation(dataset.rows)):
            first = start + turn * at_once
            if first >= stop:
                self._passes.output(self._group, self._example)
                continue
            piece = self._piece(dataset, first, min(first + at_once, stop))
            self._passes.count(total, self._passes.output(self._group, piece), piece)

    def _divide(self, mesh: DeviceMesh) -> dict[str, Part]:
        self._shard(mesh)
        named = named_tensors(self.module).tensors
        parts = {name: self._filled(name, tensor) for name, tensor in named.items() if name not in self._aliases}
        for other, name in self._aliases.items():  # the move to the device made them two
            owner, leaf = owner_of(self.module, other)
            known, known_leaf = owner_of(self.module, name)
            setattr(owner, leaf, getattr(known, known_leaf))
        return parts

    def _shard(self, mesh: DeviceMesh) -> None:
        scalars = {parameter for parameter in self.module.parameters() if not parameter.ndim}
        try:
            for unit in self._units:
                unit.register_forward_hook(lambda _, __, output: _without_views(output))
                fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
            fully_shard(self.module, mesh=mesh, ignored_params=scalars)
        except (AssertionError, ValueError, NotImplementedError) as error:
            raise SpecError(
                f"the model's parameters cannot be cut over ranks: {str(error).splitlines()[0][:300]}",
                "use a strategy that holds whole layers",
                code=ErrorCode.MODEL_UNUSABLE,
            ) from error
        gather, scatter = GroupAllGather(self._group), GroupReduceScatter(self._group)
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                if any(True for _ in _managed(module)):
                    module.set_custom_all_gather(gather)
                    module.set_custom_reduce_scatter(scatter)
        device = self._device
        cut: Any = self.module
        cut._apply(lambda tensor: _real(tensor, device))  # as to_empty, but buffers keep their values

    def _filled(self, name: str, tensor: Tensor) -> Part:
        """A tensor of the state dict with this rank's initial value in it."""
        value, extent = self._values.pop(name), self._extents[name]
        if not isinstance(tensor, DTensor):
            with torch.no_grad():
                tensor.copy_(value)
            return Part(tensor, extent)
        with torch.no_grad():
            local = tensor.to_local().detach()
            local.copy_(value)
        if tensor.requires_grad:
            self._distributed[name] = tensor
        return Part(nn.Parameter(local, requires_grad=tensor.requires_grad), extent)

    def _backward(self, piece: MicroBatch, items: int | None) -> Tensor:
        output = self._passes.output(self._group, piece)
        return self._passes.backward(self._group, output, piece, items)

    def _settle(self, value: Tensor, share: float) -> Tensor:
        """Last collective of a step: loss, share, norm of the gradient, whole parameters' gradients, batch norms."""
        gradients = [local.grad for local in self._whole]
        cut = [local.grad for name, local in self._held.trainable.items() if name in self._distributed]
        numbers = torch.stack(
            [value.cpu(), torch.tensor(share).double(), squared_norm([g for g in cut if g is not None])]
        )
        small = [
            torch.zeros(local.numel(), dtype=torch.float64)
            if grad is None
            else grad.detach().reshape(-1).cpu().double()
            for local, grad in zip(self._whole, gradients, strict=True)
        ]
        tail = torch.cat([numbers, *small, self._norms.weighted(share)]).to(self._group.device)
        self._group.all_reduce(tail)
        tail = tail.cpu()
        loss, total_share, squared = tail[:3].tolist()
        offset = 3
        for local in self._whole:
            if local.grad is not None:
                local.grad.copy_(tail[offset : offset + local.numel()].view_as(local))
                squared += float(tail[offset : offset + local.numel()].square().sum())
            offset += local.numel()
        self._norms.commit(tail[offset:], total_share)
        return self._mean(loss, squared, total_share)


def _check_types(model: nn.Module) -> None:
    types = sorted({str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad})
    if len(types) > 1:
        raise SpecError(
            f"the model's parameters are of several types ({', '.join(types)}) and cannot be gathered together",
            "make them one type, or use a strategy that holds whole layers",
            code=ErrorCode.MODEL_UNUSABLE,
        )


def _managed(module: FSDPModule) -> list[Any]:
    """A unit without parameters of its own has no collectives."""
    return list(module._get_fsdp_state()._fsdp_param_groups)


def _without_views(output: Any) -> Any:
    """FSDP2 marks what a unit returns; changed in place, a view would lose the mark and gradients would be wrong."""
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor._is_view() else tensor, output)


def _real(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
