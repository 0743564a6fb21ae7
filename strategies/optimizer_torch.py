"""Optimizers and learning rate schedules of a TrainSpec.

The rate of a step is a pure function of the step, so a resumed run needs no scheduler state. Where torch has a fused
kernel it is used: the same update in one pass over memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from protos.errors import ErrorCode, SpecError
from protos.jobspec import OptimizerSpec, ScheduleSpec

_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
_FUSED = ("sgd", "adam", "adamw", "adagrad")
_IMPLEMENTATION_KEYS = ("fused", "foreach", "capturable", "differentiable")


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, each tied one once, in the order the optimizer holds them."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_optimizer(spec: OptimizerSpec, model: nn.Module) -> torch.optim.Optimizer:
    """Raises SpecError for a keyword the optimizer does not take."""
    options: dict[str, Any] = dict(spec.model_extra or {})
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    parameters = list(named_trainable(model).values())
    dense = not any(getattr(module, "sparse", False) for module in model.modules())
    floating = all(parameter.dtype in (torch.float32, torch.float64) for parameter in parameters)
    if spec.name in _FUSED and dense and floating and not any(key in options for key in _IMPLEMENTATION_KEYS):
        options["fused"] = True
    try:
        return _CLASSES[spec.name](parameters, lr=spec.lr, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(
            f"train.optimizer: {spec.name} refused its arguments: {str(error).splitlines()[0][:300]}",
            f"the keys beside name are those of torch.optim.{_CLASSES[spec.name].__name__}",
            code=ErrorCode.INVALID_SPEC,
        ) from None


def learning_rate(spec: ScheduleSpec, base: float, step: int, steps_total: int) -> float:
    """The rate used for `step` (0 is the first): linear warm-up to `base`, then the schedule, never below minimum_lr.

    With w warm-up steps: base * (step+1)/(w+1) while step < w; then t = (step-w)/(steps_total-w) runs from 0 to 1.
    cosine: minimum + (base-minimum) * (1+cos(pi t))/2. linear: minimum + (base-minimum) * (1-t). step: multiplied by
    `factor` every `every_steps` steps after warm-up (a third of the run when not given).
    """
    warmup = spec.warmup_steps
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    length = max(steps_total - warmup, 1)
    done = min((step - warmup) / length, 1.0)
    floor = min(spec.minimum_lr, base)
    match spec.name:
        case "cosine":
            return floor + (base - floor) * (1 + math.cos(math.pi * done)) / 2
        case "linear":
            return floor + (base - floor) * (1 - done)
        case "step":
            every = spec.every_steps or max(length // 3, 1)
            return max(base * spec.factor ** ((step - warmup) // every), floor)
    return base


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
