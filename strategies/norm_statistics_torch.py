"""Running statistics of a model's batch norms, kept equal on all ranks: the average weighted by each rank's share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_NAMES = ("running_mean", "running_var", "num_batches_tracked")


def statistics_of(model: nn.Module) -> list[Tensor]:
    """Their buffers. In a model that was exported norms have no class any more: there the names tell."""
    found: list[Tensor] = []
    for module in model.modules():
        known = isinstance(module, _NormBase)
        found += [buffer for name, buffer in module.named_buffers(recurse=False) if known or name in _NAMES]
    return found


class NormStatistics:
    """`committed` are the values after the last step that every rank finished."""

    def __init__(self, model: nn.Module) -> None:
        self._all = statistics_of(model)
        self._averaged = [buffer for buffer in self._all if buffer.is_floating_point()]
        self._committed = self.now()

    @property
    def size(self) -> int:
        return sum(buffer.numel() for buffer in self._averaged)

    def now(self) -> list[Tensor]:
        return [buffer.detach().clone() for buffer in self._all]

    @torch.no_grad()
    def put_back(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._all, values, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def weighted(self, share: float) -> Tensor:
        """What this rank adds to the sum over the ranks, on the CPU."""
        flat = [buffer.detach().reshape(-1).to("cpu", torch.float64) * share for buffer in self._averaged]
        return torch.cat([torch.zeros(0, dtype=torch.float64), *flat])

    @torch.no_grad()
    def commit(self, summed: Tensor, share: float) -> None:
        """`share` is the sum of those of all ranks; 0 leaves the statistics of before the step."""
        if not self._all:
            return
        if share <= 0:
            self.put_back(self._committed)
            return
        pieces = torch.split(summed / share, [buffer.numel() for buffer in self._averaged])
        for buffer, piece in zip(self._averaged, pieces, strict=True):
            buffer.copy_(piece.view_as(buffer))
        self._committed = self.now()

    def undo(self) -> None:
        self.put_back(self._committed)

    def settle(self) -> None:
        """What the buffers hold now counts as committed: after a checkpoint was read into them."""
        self._committed = self.now()
