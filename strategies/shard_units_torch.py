"""Which modules of a model are gathered one at a time when its parameters are cut over ranks.

A unit is a block of a stack, or a child beside the stacks that holds a noticeable part of the parameters; what is left
belongs to the whole model and stays gathered during a step. The parameters of a unit are there while it is called, so
one whose parameters are also used elsewhere (tied weights, a matrix used in a function of its parent) is no unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from strategies.recompute_torch import blocks_of

SMALL_SHARE = 0.01  # of the parameters: a child with less is not worth two more collectives


def units_of(model: nn.Module, features: Tensor | Mapping[str, Tensor]) -> list[nn.Module]:
    """In the order of `model.modules()`. `features`: a few rows, for a forward pass with fake tensors."""
    blocks = [block for block in blocks_of(model) if block is not model]
    inside = {id(module) for block in blocks for module in block.modules()}
    smallest = SMALL_SHARE * sum(parameter.numel() for parameter in model.parameters())
    beside = [
        child for child in _beside(model, inside, {id(block) for block in blocks}) if _elements(child) >= smallest
    ]
    wanted = {id(module) for module in [*blocks, *beside]}
    found = [module for module in model.modules() if id(module) in wanted and _is_called(module)]
    outermost = _without_nested(found)
    refused = _shared(model, outermost) | _used_outside(model, outermost, features)
    return [module for module in outermost if id(module) not in refused]


def _beside(module: nn.Module, inside: set[int], blocks: set[int]) -> Iterator[nn.Module]:
    """The outermost modules that neither are blocks nor contain one."""
    for child in module.children():
        if id(child) in inside:
            continue
        if any(id(each) in blocks for each in child.modules()):
            yield from _beside(child, inside, blocks)
        elif _elements(child):
            yield child


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_called(module: nn.Module) -> bool:
    """And not a mere container of modules that are."""
    return type(module).forward is not nn.Module.forward


def _without_nested(modules: list[nn.Module]) -> list[nn.Module]:
    inside: set[int] = set()
    found = []
    for module in modules:
        if id(module) not in inside:
            found.append(module)
            inside |= {id(each) for each in module.modules()}
    return found


def _shared(model: nn.Module, units: list[nn.Module]) -> set[int]:
    """Units with a parameter that another module outside of them has too."""
    refused = set()
    for unit in units:
        within = {id(module) for module in unit.modules()}
        own = {id(parameter) for parameter in unit.parameters()}
        for module in model.modules():
            if id(module) not in within and any(id(each) in own for each in module.parameters(recurse=False)):
                refused.add(id(unit))
    return refused


def _used_outside(model: nn.Module, units: list[nn.Module], features: Tensor | Mapping[str, Tensor]) -> set[int]:
    """Units of which a parameter is used while they are not being called. Empty when that cannot be found out."""
    active: set[int] = set()
    handles: list[RemovableHandle] = []
    for unit in units:
        handles.append(unit.register_forward_pre_hook(lambda module, _: active.add(id(module))))
        handles.append(unit.register_forward_hook(lambda module, *_: active.discard(id(module)), always_call=True))
    uses = _Uses(active)
    try:
        with suppress(Exception), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes: dict[int, Tensor] = {}
            values: dict[str, Tensor] = {}
            for name, parameter in model.named_parameters(remove_duplicate=False):
                if id(parameter) not in fakes:
                    fakes[id(parameter)] = torch.empty(parameter.shape, dtype=parameter.dtype)
                values[name] = fakes[id(parameter)]
            for name, buffer in model.named_buffers(remove_duplicate=False):
                values[name] = mode.from_tensor(buffer).clone()
            for unit in units:
                for parameter in unit.parameters():
                    uses.unit_of[id(fakes[id(parameter)])] = id(unit)
            given: Any = _map(mode, features)
            with uses:
                if isinstance(given, dict):
                    functional_call(model, values, (), given)
                else:
                    functional_call(model, values, (given,))
    finally:
        for handle in handles:
            handle.remove()
    return uses.outside


def _map(mode: FakeTensorMode, features: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
    if isinstance(features, Mapping):
        return {name: mode.from_tensor(tensor) for name, tensor in features.items()}
    return mode.from_tensor(features)


class _Uses(TorchFunctionMode):
    def __init__(self, active: set[int]) -> None:
        super().__init__()
        self.active = active
        self.unit_of: dict[int, int] = {}
        self.outside: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in [*args, *(kwargs or {}).values()]:
            unit = self.unit_of.get(id(tensor)) if isinstance(tensor, Tensor) else None
            if unit is not None and unit not in self.active:
                self.outside.add(unit)
        return func(*args, **(kwargs or {}))
