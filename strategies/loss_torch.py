"""Losses as sums and counts, so that pieces of a batch add up to exactly the mean over the whole of it.

A loss is the sum over items (rows, elements, or tokens that are not ignored) of one piece; the engine divides by the
count of the whole global batch. The user's own FILE.py:FUNCTION(output, target) returns the mean over the rows it got.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from protos.errors import ErrorCode, SpecError
from protos.jobspec import entry_point
from strategies.faults_torch import UserCodeError
from strategies.model_torch import load_function

IGNORED = -100  # torch's default ignore_index


class Loss:
    """`name` is one of jobspec.BUILT_LOSSES or FILE.py:FUNCTION."""

    def __init__(self, name: str, code_dir: Path | None) -> None:
        self.name = name
        self._custom: Callable[..., Any] | None = load_function(name, code_dir) if entry_point(name) else None

    def items(self, target: Tensor) -> int:
        """How many items the mean is taken over; `target` is still on the CPU, so nothing waits for a device."""
        if self._custom is not None:
            return len(target)
        if self.name in ("cross_entropy", "causal_lm"):
            if target.is_floating_point():  # class probabilities, classes in dimension 1
                return target.numel() // target.shape[1]
            ids = target.numpy()  # numpy counts a small batch in a tenth of the time
            return ids.size - int(np.count_nonzero(ids == IGNORED))
        return target.numel()

    def items_per_row(self, target: Tensor) -> int:
        """Items of a row of which none is ignored: what a share of the global batch is measured in."""
        if self._custom is not None or not len(target):
            return 1
        if self.name == "cross_entropy" and target.is_floating_point():
            return math.prod(target.shape[2:])
        return math.prod(target.shape[1:])

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        """The sum over the items of this piece, differentiable."""
        output = logits_of(output)
        if self._custom is not None:
            return self._mean_of_custom(output, target) * len(target)
        try:
            return self._built(output if output.dtype == torch.float64 else output.float(), target)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise SpecError(
                f"{self.name} cannot compare an output of shape {list(output.shape)} with a target of shape "
                f"{list(target.shape)} {target.dtype}: {str(error).splitlines()[0][:200]}",
                "check data.target, the last layer of the model, and train.loss",
                code=ErrorCode.MODEL_UNUSABLE,
            ) from None

    def correct(self, output: Any, target: Tensor) -> tuple[Tensor, int] | None:
        """(right answers, answers) for losses that classify, None for the others."""
        output = logits_of(output)
        if self.name == "bce_with_logits":
            return ((output > 0) == (target.reshape(output.shape) > 0.5)).sum(), target.numel()
        if self.name == "causal_lm":
            return ((output.argmax(-1) == target) & (target != IGNORED)).sum(), self.items(target)
        if self.name == "cross_entropy" and not target.is_floating_point():
            return ((output.argmax(1) == target) & (target != IGNORED)).sum(), self.items(target)
        return None

    def _built(self, output: Tensor, target: Tensor) -> Tensor:
        match self.name:
            case "cross_entropy":
                return functional.cross_entropy(output, target, reduction="sum")
            case "causal_lm":
                return functional.cross_entropy(
                    output.reshape(-1, output.shape[-1]), target.reshape(-1), reduction="sum"
                )
            case "bce_with_logits":
                target = target.reshape(output.shape).to(output.dtype)
                return functional.binary_cross_entropy_with_logits(output, target, reduction="sum")
            case "l1":
                return functional.l1_loss(output, target.reshape(output.shape), reduction="sum")
        return functional.mse_loss(output, target.reshape(output.shape), reduction="sum")

    def _mean_of_custom(self, output: Any, target: Tensor) -> Tensor:
        assert self._custom is not None
        try:
            value = self._custom(output, target)
        except Exception as error:
            raise UserCodeError(f"computing the loss {self.name}") from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise SpecError(
                f"{self.name} returned {shape}, not one number",
                "return the mean over the rows as a scalar tensor",
                code=ErrorCode.MODEL_UNUSABLE,
            )
        return value.reshape(())


def logits_of(output: Any) -> Any:
    """The tensor in what a model returns: itself, `.logits`, ["logits"], or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise SpecError(
        f"the model returned {type(output).__name__}",
        "return a tensor, a tuple that starts with one, or something with .logits",
        code=ErrorCode.MODEL_UNUSABLE,
    )
