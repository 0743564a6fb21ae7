"""Gradient averaging over the ranks of a group: equal to the gradient of the whole batch on one machine.

Each rank divides its loss by the size of the whole global batch, so gradients are summed, whatever the slices; a rank
with an empty slice sends zeros. Gradients live in flat buckets that are reduced while the backward pass of earlier
layers still runs, in one order on all ranks. A small tail travels with them: loss, items, which parameters got a
gradient (one without stays untouched by weight decay, as on one machine), and the running statistics of batch norms.

torch's DistributedDataParallel is not used: it averages evenly, needs a dummy row on a rank without any, and can abort
the process when a peer dies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from protos.errors import ErrorCode, SpecError
from strategies.codecs_torch import Codec, Plain
from strategies.faults_torch import PeerLost
from strategies.group_torch import Group, Pending
from strategies.norm_statistics_torch import statistics_of
from strategies.optimizer_torch import named_trainable
from strategies.single_node_torch import Scales

FIRST_BUCKET_BYTES = 1024 * 1024  # the first to be ready is small, so that sending starts early
BUCKET_BYTES = 16 * 1024 * 1024


@dataclass(slots=True)
class _Bucket:
    flat: Tensor  # gradients, and in the last bucket the tail
    size: int  # elements of gradients
    parameters: list[tuple[int, nn.Parameter, Tensor]]  # (index, parameter, its gradient as a view of flat)
    waiting: int = 0
    wire: Tensor | None = None
    pending: Pending | None = None


@dataclass(slots=True)
class _Norms:
    """Buffers of batch norms: `averaged` travel in the tail as `views`, `all` are put back when a step is undone."""

    averaged: list[Tensor] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)
    all: list[Tensor] = field(default_factory=list)
    committed: list[Tensor] = field(default_factory=list)


class GradientSync:
    """Sync over a group. Buckets follow the reverse order of the parameters: about that of the backward pass."""

    def __init__(self, model: nn.Module, group: Group, codec: Codec) -> None:
        self._group = group
        self._codec = codec
        self._parameters = list(named_trainable(model).values())
        self._norms = _norms_of(model)
        self._touched = [False] * len(self._parameters)
        tail_size = 2 + len(self._parameters) + sum(tensor.numel() for tensor in self._norms.averaged)
        self._buckets, self._tail = _make_buckets(self._parameters, tail_size, inside=isinstance(codec, Plain))
        self._tail_alone = self._tail._base is None
        self._tail_pending: Pending | None = None
        self._tail_wire = self._tail
        offset = 2 + len(self._parameters)
        sizes = [tensor.numel() for tensor in self._norms.averaged]
        pieces = torch.split(self._tail[offset:], sizes) if sizes else ()
        self._norms.views = [view.view_as(norm) for view, norm in zip(pieces, self._norms.averaged, strict=True)]
        self._bucket_of = {index: bucket for bucket in self._buckets for index, _, _ in bucket.parameters}
        self._scales = Scales()
        self._next = 0
        self._armed = False
        self._failure: Exception | None = None
        self._share = 0.0
        self._loss_parts: list[Tensor] = []
        for index, parameter in enumerate(self._parameters):
            hook: Any = parameter.register_post_accumulate_grad_hook
            hook(lambda _, index=index: self._arrived(index))

    def begin(self, share: float) -> None:
        self._share = share
        self._next = 0
        self._armed = False
        self._failure = None
        self._tail_pending = None
        self._touched = [False] * len(self._parameters)
        self._loss_parts = []
        for bucket in self._buckets:
            bucket.flat.zero_()
            bucket.waiting = len(bucket.parameters)
            bucket.pending = bucket.wire = None
            for _, parameter, view in bucket.parameters:
                parameter.grad = view

    def backward(self, loss: Tensor, items: int, last: bool) -> None:
        scale = self._scales.of(loss, items)
        self._loss_parts.append(loss.detach() * scale)
        self._armed = last
        torch.autograd.backward(loss, scale)

    def finish(self) -> Tensor:
        if self._failure is None:
            self._armed = True
            while self._next < len(self._buckets):  # empty slice, or parameters that got no gradient
                self._launch()
        if self._failure is not None:
            raise self._failure
        for bucket in self._buckets:
            assert bucket.pending is not None and bucket.wire is not None
            bucket.pending.wait()
            self._codec.decode(bucket.wire, bucket.flat)
        if self._tail_pending is not None:
            self._tail_pending.wait()
            if self._tail_wire is not self._tail:
                self._tail.copy_(self._tail_wire)
        return self._settle()

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, committed in zip(self._norms.all, self._norms.committed, strict=True):
                tensor.copy_(committed)

    def _settle(self) -> Tensor:
        """What the summed tail says: the share, parameters without a gradient anywhere, batch norm statistics."""
        count = len(self._parameters)
        head = self._tail[: 2 + count].tolist()
        share = float(head[1])
        loss = self._tail[0].clone()
        if abs(share - 1.0) > 1e-6 and share > 0:
            for bucket in self._buckets:
                bucket.flat[: bucket.size].div_(share)
            loss = loss / share
        for index, touched in enumerate(head[2:]):
            if not touched:
                self._parameters[index].grad = None
        with torch.no_grad():
            norms = self._norms
            if norms.all:
                if share not in (0.0, 1.0):
                    torch._foreach_div_(norms.views, share)
                torch._foreach_copy_(norms.averaged, norms.views)
                torch._foreach_copy_(norms.committed, norms.all)
        return loss

    def _arrived(self, index: int) -> None:
        """The gradient of a parameter is complete for this micro-batch."""
        first = not self._touched[index]
        self._touched[index] = True
        if not self._armed or self._failure is not None:
            return
        bucket = self._bucket_of[index]
        bucket.waiting -= 1
        if bucket.waiting < 0 or (bucket.pending is not None and first):
            self._failure = SpecError(
                "a parameter received its gradient twice in one backward pass",
                "with activation checkpointing use use_reentrant=False",
                code=ErrorCode.MODEL_UNUSABLE,
            )
            return
        while self._next < len(self._buckets) and self._buckets[self._next].waiting == 0:
            self._launch()

    def _launch(self) -> None:
        """Starts the next bucket. A failure is kept for `finish`: it must not look like one of the user's model."""
        bucket = self._buckets[self._next]
        is_last = self._next == len(self._buckets) - 1
        self._next += 1
        try:
            if is_last:
                self._fill_tail()
            bucket.wire = self._codec.encode(bucket.flat).to(self._group.device)
            bucket.pending = self._group.start_all_reduce(bucket.wire)
            if is_last and self._tail_alone:
                self._tail_wire = self._tail.to(self._group.device)
                self._tail_pending = self._group.start_all_reduce(self._tail_wire)
        except PeerLost as error:
            self._failure = error
            self._next = len(self._buckets)

    def _fill_tail(self) -> None:
        with torch.no_grad():
            count = len(self._parameters)
            loss = sum((float(part) for part in self._loss_parts), 0.0)
            self._tail[: 2 + count] = torch.tensor(
                [loss, self._share, *(float(touched) for touched in self._touched)], dtype=torch.float32
            )
            if self._norms.averaged:
                torch._foreach_copy_(self._norms.views, self._norms.averaged)
                torch._foreach_mul_(self._norms.views, self._share)


def _make_buckets(parameters: list[nn.Parameter], tail_size: int, inside: bool) -> tuple[list[_Bucket], Tensor]:
    """Buckets of one dtype and device each, and the fp32 tail: a view of the last bucket where it may be `inside`."""
    groups: list[list[int]] = []
    size, limit = 0, FIRST_BUCKET_BYTES
    for index in reversed(range(len(parameters))):
        parameter = parameters[index]
        alike = groups and _kind(parameters[groups[-1][-1]]) == _kind(parameter)
        if not alike or size >= limit:
            if groups:
                limit = BUCKET_BYTES
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += parameter.numel() * parameter.element_size()
    buckets: list[_Bucket] = []
    tail = torch.empty(0)
    for number, indices in enumerate(groups):
        dtype, device = _kind(parameters[indices[0]])
        total = sum(parameters[index].numel() for index in indices)
        with_tail = inside and number == len(groups) - 1 and dtype == torch.float32
        flat = torch.zeros(total + (tail_size if with_tail else 0), dtype=dtype, device=device)
        views, offset = [], 0
        for index in indices:
            parameter = parameters[index]
            view = flat[offset : offset + parameter.numel()].view(parameter.shape)
            views.append((index, parameter, view))
            offset += parameter.numel()
        buckets.append(_Bucket(flat, total, views))
        if with_tail:
            tail = flat[total:]
    return buckets, tail if len(tail) else torch.zeros(tail_size, dtype=torch.float32)


def _kind(parameter: nn.Parameter) -> tuple[torch.dtype, torch.device]:
    return parameter.dtype, parameter.device


def _norms_of(model: nn.Module) -> _Norms:
    buffers = statistics_of(model)
    averaged = [buffer for buffer in buffers if buffer.is_floating_point()]
    return _Norms(averaged, [], buffers, [buffer.detach().clone() for buffer in buffers])
