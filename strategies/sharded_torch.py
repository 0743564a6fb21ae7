"""Engine of ranks that cut every parameter, gradient and optimizer state over all of them (torch's FSDP2).

Before a unit of the model runs its parameters are gathered, after it they are dropped; the backward pass sends each
rank the summed gradient of its part. Parts are equal (torch.chunk of dimension 0): a node with more memory takes more
ranks. The rows of a rank may be any number: each loss is divided by the size of the whole global batch and gradients
are summed. All ranks make the same number of passes; one with fewer micro-batches fills up with rows of weight zero.

Refuses a model that uses other parameters on one rank than on the others: the collectives would not meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from protos.errors import ErrorCode, SpecError
from strategies.batches_torch import MicroBatch, StepBatch, micro_batch, read, to_device
from strategies.checkpoint_torch import TrainingState
from strategies.context import TaskContext
from strategies.data.dataset import Dataset
from strategies.evaluate_torch import Score
from strategies.extent import Extent
from strategies.gather_model_torch import write_parts
from strategies.group_torch import Group, single
from strategies.heap import give_back, return_large_blocks
from strategies.held_parts_torch import HeldParts, Part, chunk_of, scale_to, squared_norm
from strategies.hollow_model_torch import build_hollow, named_tensors, owner_of
from strategies.initial_values_torch import initial_parts
from strategies.loss_torch import Loss
from strategies.norm_statistics_torch import NormStatistics
from strategies.passes_torch import Passes, check_device, score_of
from strategies.recompute_torch import recompute_blocks
from strategies.sample_order import slice_of
from strategies.shard_collectives_torch import GroupAllGather, GroupReduceScatter
from strategies.shard_turns_torch import Turns
from strategies.shard_units_torch import units_of

EXAMPLE_ROWS = 2  # what a rank without rows computes on: batch norms want more than one


class Sharded:
    """Engine of a group of at least two. Made before the group is connected; unusable until `connected`."""

    def __init__(self, context: TaskContext, loss: Loss, dataset: Dataset, device: torch.device) -> None:
        """Builds the model without memory for it, and this rank's part of the initial values. Raises SpecError,
        UserCodeError, DataUnusable, Exhausted for a full disk."""
        task, workspace, spec = context.task, context.workspace, context.task.spec
        self._context = context
        self._loss = loss
        self._device = device
        rows = read(dataset, np.arange(EXAMPLE_ROWS, dtype=np.int64) % max(dataset.rows, 1))
        example = micro_batch(rows, loss, torch.device("cpu"))
        self._example = to_device(example, self._device)
        self.module = build_hollow(spec.model, workspace.code_dir, workspace.weights_path, spec.train.seed)
        _check_types(self.module)
        return_large_blocks(sum(tensor.nbytes for tensor in self.module.parameters()), context.memory_bytes)
        if task.layout is not None and task.layout.checkpoint_activations:
            recompute_blocks(self.module)
        self._units = units_of(self.module, example.features)
        named = named_tensors(self.module)
        self._aliases = named.aliases
        self._extents = {name: _extent(tensor, task.rank, task.world_size) for name, tensor in named.tensors.items()}
        self._values = initial_parts(spec, workspace, self._extents)
        self._group = single()
        self._passes = Passes(self.module, loss, spec.train.precision, self._device)
        self._squared_norm = 0.0

    def connected(self, context: TaskContext, group: Group) -> None:
        """Cuts the model over the group, whose ranks all call it. Raises PeerLost, SpecError."""
        task = context.task
        check_device(self._device, group)
        self._group = group
        torch.set_autocast_cache_enabled(False)  # it would keep a copy of every unit that was gathered
        self._cut(group)
        named = named_tensors(self.module)
        parts: dict[str, Part] = {}
        self._cut_parameters: dict[str, DTensor] = {}
        for name, tensor in named.tensors.items():
            if name not in self._aliases:
                parts[name] = self._filled(name, tensor)
        for other, name in self._aliases.items():  # the move to the device made them two
            owner, leaf = owner_of(self.module, other)
            known, known_leaf = owner_of(self.module, name)
            setattr(owner, leaf, getattr(known, known_leaf))
        self._held = HeldParts(parts, self._aliases, task.spec.train.optimizer)
        self._whole = [local for name, local in self._held.trainable.items() if name not in self._cut_parameters]
        self._norms = NormStatistics(self.module)
        give_back()
        own = torch.tensor([task.accumulate], dtype=torch.int64, device=group.device)
        self._turns = Turns(task.samples, tuple(int(each.item()) for each in group.all_gather(own)))
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
        """Of what this rank holds between two steps."""
        return self._held.parameter_bytes

    def gradients(self, batch: StepBatch) -> Tensor:
        for parameter in [*self._cut_parameters.values(), *self._held.trainable.values()]:
            parameter.grad = None
        value = torch.zeros((), dtype=torch.float64, device=self._device)
        for piece in batch.micro_batches:
            value += self._backward(piece, batch.nominal_items)
        missing = self._turns.of_step(batch.global_rows) - len(batch.micro_batches)
        if missing > 0:
            statistics = self._norms.now()
            for _ in range(missing):
                self._backward(self._example, None)
            self._norms.put_back(statistics)
        for name, cut in self._cut_parameters.items():
            if isinstance(cut.grad, DTensor):
                self._held.trainable[name].grad = cut.grad.to_local()
        return self._settle(value, batch.share)

    def clip(self, norm: float) -> None:
        scale_to(self._gradients(), self._squared_norm**0.5, norm)

    def undo(self) -> None:
        self._norms.undo()

    def evaluate(self, dataset: Dataset) -> Score:
        rank = self._group.rank
        start, stop = slice_of(dataset.rows, self._turns.samples, rank)
        at_once = self._turns.rows_at_once(rank)
        total = torch.zeros(4, dtype=torch.float64, device=self._device)  # loss, items, right answers, answers
        self.module.eval()
        try:
            with torch.no_grad():
                for turn in range(self._turns.of_evaluation(dataset.rows)):
                    first = start + turn * at_once
                    if first >= stop:
                        self._passes.output(self._group, self._example)
                        continue
                    rows = np.arange(first, min(first + at_once, stop), dtype=np.int64)
                    piece = to_device(micro_batch(read(dataset, rows), self._loss, torch.device("cpu")), self._device)
                    self._passes.count(total, self._passes.output(self._group, piece), piece)
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
        task = self._context.task
        place = TrainingState(step, samples, epoch, {}, {}, {}, {}, {}, int(task.fence), task.rank, task.world_size)
        return self._held.capture(place, copy)

    def restore(self, state: TrainingState) -> None:
        self._held.restore(state)
        self._norms.settle()

    def write_model(self, path: Path) -> bool:
        return write_parts(path, self._group, self._held.parts, self._aliases)

    def _cut(self, group: Group) -> None:
        mesh = init_device_mesh(group.device.type, (group.world_size,))
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
        gather, scatter = GroupAllGather(group), GroupReduceScatter(group)
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
            return Part(tensor, extent, None)
        with torch.no_grad():
            local = tensor.to_local().detach()
            local.copy_(value)
        if tensor.requires_grad:
            self._cut_parameters[name] = tensor
        return Part(nn.Parameter(local, requires_grad=tensor.requires_grad), extent, 0)

    def _backward(self, piece: MicroBatch, items: int | None) -> Tensor:
        output = self._passes.output(self._group, piece)
        return self._passes.backward(self._group, output, piece, items)

    def _settle(self, value: Tensor, share: float) -> Tensor:
        """Last collective of a step: loss, share, norm of the gradient, whole parameters' gradients, batch norms."""
        gradients = [local.grad for local in self._whole]
        cut = [local.grad for name, local in self._held.trainable.items() if name in self._cut_parameters]
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
        if abs(total_share - 1.0) > 1e-6 and total_share > 0:  # ignored targets: the mean is over fewer items
            torch._foreach_div_(self._gradients(), total_share)
            loss, squared = loss / total_share, squared / total_share**2
        self._squared_norm = squared
        return torch.tensor(loss, dtype=torch.float32)

    def _gradients(self) -> list[Tensor]:
        return [local.grad for local in self._held.trainable.values() if local.grad is not None]


def _check_types(model: nn.Module) -> None:
    types = sorted({str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad})
    if len(types) > 1:
        raise SpecError(
            f"the model's parameters are of several types ({', '.join(types)}) and cannot be gathered together",
            "make them one type, or use a strategy that holds whole layers",
            code=ErrorCode.MODEL_UNUSABLE,
        )


def _extent(tensor: Tensor, rank: int, ranks: int) -> Extent:
    """Parameters are cut in their first dimension; buffers and single numbers are held by all."""
    if isinstance(tensor, nn.Parameter) and tensor.ndim:
        return chunk_of(tuple(tensor.shape), 0, rank, ranks)
    return Extent.whole(tuple(tensor.shape))


def _managed(module: FSDPModule) -> list[Any]:
    """A unit without parameters of its own has no collectives."""
    return list(module._get_fsdp_state()._fsdp_param_groups)


def _without_views(output: Any) -> Any:
    """FSDP2 marks what a unit returns; changed in place, a view would lose the mark and gradients would be wrong."""
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor._is_view() else tensor, output)


def _real(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
