"""Passes of a model whose forward and backward pass themselves talk to other ranks: whose fault an exception is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from protos.errors import Blame, ErrorCode, SpecError
from strategies.batches_torch import MicroBatch
from strategies.evaluate_torch import Score
from strategies.faults_torch import PeerLost, UserCodeError
from strategies.forward_torch import Forward, of_backward
from strategies.group_torch import Group
from strategies.loss_torch import Loss
from strategies.single_node_torch import Scales


class Passes:
    """Of one module over a group. Every method raises PeerLost when the group broke meanwhile."""

    def __init__(self, module: nn.Module, loss: Loss, precision: str, device: torch.device) -> None:
        self._forward = Forward(module, precision, device)
        self._loss = loss
        self._scales = Scales()

    def output(self, group: Group, piece: MicroBatch) -> Any:
        """What the model returns. Raises UserCodeError too."""
        try:
            return self._forward(piece)
        except UserCodeError as error:
            cause = error.__cause__
            if cause is not None:
                _raise_lost(group, cause)
            raise

    def backward(self, group: Group, output: Any, piece: MicroBatch, items: int | None) -> Tensor:
        """Adds to the gradients; the piece's part of the mean loss. `items` None gives it no weight."""
        loss = self._loss(output, piece.target)
        scale = self._scales.of(loss, items) if items else torch.zeros_like(loss)
        try:
            torch.autograd.backward(loss, scale)
        except RuntimeError as error:
            _raise_lost(group, error)
            fault = of_backward(error)
            raise fault from fault.__cause__
        return loss.detach().double() * scale

    def count(self, total: Tensor, output: Any, piece: MicroBatch) -> None:
        """Adds to (loss, items, right answers, answers)."""
        total[0] += self._loss(output, piece.target).double()
        total[1] += piece.items
        answers = self._loss.correct(output, piece.target)
        if answers is not None:
            total[2] += answers[0].double()
            total[3] += answers[1]


def check_device(device: torch.device, group: Group) -> None:
    """Raises SpecError, the node's fault, when the group does not talk on the device that computes."""
    if device.type != group.device.type:
        raise SpecError(
            f"this rank computes on {device.type}, but its group talks over {group.device.type}",
            "ranks that share a model need GPUs on all of their nodes, or on none",
            code=ErrorCode.UNSUPPORTED,
            blame=Blame.NODE,
        )


def score_of(total: Tensor) -> Score:
    loss, items, right, answered = total.tolist()
    return Score(loss / max(items, 1.0), right / answered if answered else None)


def _raise_lost(group: Group, error: BaseException) -> None:
    """Only if that is what it is."""
    if isinstance(error, PeerLost):
        raise error
    if group.broke(error):
        raise group.lost(error) from error
