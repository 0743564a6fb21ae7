"""Gradients of a pipeline: summed over the replicas of a stage and, for tied weights, over the stages that share them.

Losses are divided by the items of the whole global batch before they are differentiated, so sums are means. With the
gradients travel which parameters got one at all (without, weight decay leaves a parameter alone, as on one machine) and
the running statistics of norms, averaged by the share of the batch that each replica had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.group_torch import Group
from strategies.sums_torch import Sum

BUCKET_BYTES = 16 * 1024 * 1024


@dataclass(slots=True)
class _Shared:
    """Parameters and averaged buffers that the ranks of one group have in common; `sums` are the buffers' sums."""

    group: dist.ProcessGroup
    parameters: list[nn.Parameter] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)


class StageSync:
    """`everyone`: the group of all ranks. `replicas`: that of this stage, None when there is one replica. `tied`: for
    the names that other stages hold too, the group of all their ranks."""

    def __init__(
        self,
        everyone: Group,
        stage: nn.Module,
        replicas: dist.ProcessGroup | None,
        tied: Mapping[str, dist.ProcessGroup],
    ) -> None:
        self._everyone = everyone
        named = {name: each for name, each in stage.named_parameters() if each.requires_grad}
        self._parameters = list(named.values())
        self._buffers = list(stage.buffers())
        self._committed = [buffer.detach().clone() for buffer in self._buffers]
        self._shared: list[_Shared] = []
        if replicas is not None:
            floating = [buffer for buffer in self._buffers if buffer.is_floating_point()]
            own = [parameter for name, parameter in named.items() if name not in tied]
            self._shared.append(_Shared(replicas, own, floating))
        self._shared += [_Shared(group, [named[name]]) for name, group in sorted(tied.items()) if name in named]

    def begin(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def finish(self, loss: float, share: float, last_stage: bool) -> Tensor:
        """`share`: this replica's items over the nominal ones of the batch; `loss` counts on its last stage.

        The last word is a sum over everyone: whoever leaves it knows that all ranks made the step. Returns the mean
        loss of the global batch. Raises PeerLost.
        """
        for shared in self._shared:
            self._sum(shared, share)
        total = torch.tensor([loss, share] if last_stage else [0.0, 0.0], dtype=torch.float64)
        total = total.to(self._everyone.device)
        self._everyone.all_reduce(total)
        mean, whole = total.tolist()
        if whole > 0 and abs(whole - 1.0) > 1e-6:  # ignored targets: the mean is over fewer items than nominal
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            torch._foreach_div_(gradients, whole)
            mean /= whole
        with torch.no_grad():
            for shared in self._shared:
                for buffer, summed in zip(shared.buffers, shared.sums, strict=True):
                    if whole > 0:
                        buffer.copy_(summed / whole)
            for committed, buffer in zip(self._committed, self._buffers, strict=True):
                committed.copy_(buffer)
        return torch.tensor(mean)

    def undo(self) -> None:
        with torch.no_grad():
            for buffer, committed in zip(self._buffers, self._committed, strict=True):
                buffer.copy_(committed)

    def restored(self) -> None:
        """After a state was loaded: what `undo` goes back to."""
        with torch.no_grad():
            for committed, buffer in zip(self._committed, self._buffers, strict=True):
                committed.copy_(buffer)

    def _sum(self, shared: _Shared, share: float) -> None:
        parameters = shared.parameters
        touched = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        touched = self._reduce(touched.to(self._everyone.device), shared.group).cpu()
        for parameter, count in zip(parameters, touched.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for bucket in _buckets(gradients):
            self._reduce_together(bucket, shared.group)
        with torch.no_grad():
            shared.sums = [buffer * share for buffer in shared.buffers]
        for bucket in _buckets(shared.sums):
            self._reduce_together(bucket, shared.group)

    def _reduce_together(self, tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        if len(tensors) == 1:
            self._reduce(tensors[0], group)
            return
        flat = self._reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), group)
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

    def _reduce(self, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        self._everyone.run(0, Sum(group, tensor).run)  # the kernel counts what pipelines send
        return tensor


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of one type each and of about BUCKET_BYTES, in an order that is the same on every rank."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (bucket[0].dtype != tensor.dtype or size >= BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket
