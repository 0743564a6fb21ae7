"""The two collectives of FSDP2, sent through our group: counted, capped, and a lost peer is a PeerLost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter  # no public name yet

from strategies.group_torch import Group


class GroupAllGather(AllGather):
    """Whole parameters of a unit from the parts of all ranks."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        sends_bytes = (group.size() - 1) * _bytes(input_tensor)
        self._group.run(sends_bytes, lambda: dist.all_gather_single(output_tensor, input_tensor, group=group))


class GroupReduceScatter(ReduceScatter):
    """To each rank the sum of everyone's gradients of its part."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        sends_bytes = (group.size() - 1) * _bytes(output_tensor)
        if input_tensor.device.type == "cpu":
            self._group.run(sends_bytes, lambda: _sum_of_pieces(output_tensor, input_tensor, group))
        else:
            self._group.run(
                sends_bytes, lambda: dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group)
            )


def _sum_of_pieces(output: Tensor, given: Tensor, group: dist.ProcessGroup) -> None:
    """gloo's own is an all-reduce of everything, which sends twice as much."""
    pieces = torch.empty_like(given)
    dist.all_to_all_single(pieces, given, group=group)
    torch.sum(pieces.view(group.size(), -1), dim=0, out=output)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
