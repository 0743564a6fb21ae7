"""A sum over the ranks of one process group, in place.

What is small (`cost.gathered`) is gathered on CPUs: each rank gets what all have and adds it up in the order of the
ranks, in half the rounds of a ring. Everything else goes around a ring, on GPUs everything. Either way the result is
the same to the bit on every rank. Knows no caps and no failures: the Group that starts a sum counts and bounds it.
"""

from __future__ import annotations

from typing import Any

import torch

from strategies.cost import gathered


class Sum:
    """Every rank starts the same sums in the same order; the tensor is not touched until `wait`. A group that broke may
    still write into `own` and `parts`: whoever abandons it keeps this object."""

    __slots__ = ("_group", "_work", "own", "parts", "sends_bytes", "tensor")

    def __init__(self, group: Any, tensor: torch.Tensor) -> None:
        """`group`: a ProcessGroup or its backend."""
        ranks, size_bytes = group.size(), tensor.numel() * tensor.element_size()
        self.tensor = tensor
        self.own = tensor.contiguous()  # messages hold what lies in memory, and there the ranks may differ
        self.parts: torch.Tensor | None = None  # what each rank has, as it arrives, a row for each
        self.sends_bytes = 2 * (ranks - 1) * size_bytes // ranks
        if tensor.device.type == "cpu" and gathered(ranks, size_bytes):
            self.parts = self.own.new_empty((ranks, *tensor.shape))
            self.sends_bytes = (ranks - 1) * size_bytes
        self._group = group
        self._work: Any = None

    def start(self) -> Sum:
        if self.parts is None:
            self._work = self._group.allreduce([self.own])
        else:
            self._work = self._group.allgather([list(self.parts.unbind())], [self.own])
        return self

    def wait(self) -> None:
        self._work.wait()
        if self.parts is None:
            if self.own is not self.tensor:
                self.tensor.copy_(self.own)
            return
        first, *others = self.parts.unbind()
        self.tensor.copy_(first)
        for part in others:  # one after the other: processors that differ would sum a column in other orders
            self.tensor.add_(part)

    def run(self) -> None:
        """Blocking."""
        self.start().wait()
