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

    def backward(self, loss: Tensor, last: bool) -> None:
        """`loss` is this piece's sum divided by the nominal number of items of the whole global batch."""

    def finish(self) -> Tensor:
        """The mean loss over the global batch; it may still be on a device."""

    def undo(self) -> None: ...


class LocalSync:
    """Sync for a world of one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._loss = torch.zeros(())
        self._share = 1.0

    def begin(self, share: float) -> None:
        self._share = share
        self._optimizer.zero_grad(set_to_none=True)
        self._loss = torch.zeros(())

    def backward(self, loss: Tensor, last: bool) -> None:
        torch.autograd.backward(loss)
        value = loss.detach()
        self._loss = value if self._loss.device != value.device else self._loss + value

    def finish(self) -> Tensor:
        share = self._share
        if abs(share - 1.0) > 1e-6 and share > 0:  # ignored targets: the mean is over fewer items than nominal
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.div_(share)
            self._loss = self._loss / share
        return self._loss

    def undo(self) -> None:
        return None
