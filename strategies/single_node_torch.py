"""One rank: the gradient is already that of the whole batch. data_parallel_torch is the other Sync."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Sync(Protocol):
    """Turns the pieces of one global batch, on however many ranks, into its mean gradient and mean loss.

    Life cycle of a step: `begin`, one `backward` per micro-batch of this rank (none when its slice is empty), `finish`.
    After `finish` every rank's `.grad` holds the mean gradient. When `finish` raises PeerLost, `undo` gives back the
    module's buffers of the last committed step.
    """

    def begin(self, share: float) -> None:
        """`share` is this rank's real items over the nominal items of the whole global batch."""

    def backward(self, loss: Tensor, items: int, last: bool) -> None:
        """`loss` is this piece's sum; `items` the nominal number of items of the whole global batch."""

    def finish(self) -> Tensor:
        """The mean loss over the global batch; it may still be on a device."""

    def undo(self) -> None: ...


class LocalSync:
    """Sync for a world of one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._parameters: list[Tensor] = [each for group in optimizer.param_groups for each in group["params"]]
        self._scales = Scales()
        self._loss: Tensor | None = None
        self._share = 1.0

    def begin(self, share: float) -> None:
        self._share = share
        self._loss = None
        for parameter in self._parameters:  # Optimizer.zero_grad does the same in ten times the time
            parameter.grad = None

    def backward(self, loss: Tensor, items: int, last: bool) -> None:
        scale = self._scales.of(loss, items)
        torch.autograd.backward(loss, scale)
        value = loss.detach() * scale
        self._loss = value if self._loss is None else self._loss + value

    def finish(self) -> Tensor:
        share, loss = self._share, self._loss
        assert loss is not None
        if abs(share - 1.0) > 1e-6 and share > 0:  # ignored targets: the mean is over fewer items than nominal
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(share)
            loss = loss / share
        return loss

    def undo(self) -> None:
        return None


class Scales:
    """1/items as a tensor, made once: given to `backward` it costs less than a division in the graph."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.dtype], Tensor] = {}

    def of(self, loss: Tensor, items: int) -> Tensor:
        key = (items, loss.dtype)
        scale = self._known.get(key)
        if scale is None:
            scale = self._known[key] = torch.full((), 1.0 / items, dtype=loss.dtype, device=loss.device)
        return scale
