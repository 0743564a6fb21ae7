"""One pass of the user's model over a micro-batch: their exceptions are theirs, the precision is the job's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from strategies.batches_torch import MicroBatch
from strategies.faults_torch import UserCodeError, is_memory


class Forward:
    """What the model returns for a micro-batch. Raises UserCodeError."""

    def __init__(self, model: nn.Module, precision: str, device: torch.device) -> None:
        self._model = model
        self._half = precision == "bf16"
        self._device = device

    def __call__(self, piece: MicroBatch) -> Any:
        try:
            if self._half:
                with torch.autocast(self._device.type, dtype=torch.bfloat16):
                    return self._call(piece.features)
            return self._call(piece.features)
        except Exception as error:
            raise UserCodeError("in the model's forward pass") from error

    def _call(self, features: Tensor | dict[str, Tensor]) -> Any:
        return self._model(**features) if isinstance(features, dict) else self._model(features)


def of_backward(error: RuntimeError) -> Exception:
    """What a RuntimeError of the backward pass is: memory is the node's, anything else the model's."""
    if is_memory(error):
        return error
    fault = UserCodeError("in the backward pass")
    fault.__cause__ = error
    return fault
