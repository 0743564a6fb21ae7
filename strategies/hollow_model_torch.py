"""A model whose parameters take no memory: built by the user's function, every parameter turned to the meta device in
the moment it is registered.

Buffers and plain tensors keep their values, so what is computed from them while building (masks, frequencies) is right.
Never more than one parameter exists at a time. Tied parameters stay tied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary

from protos.errors import ErrorCode, SpecError
from protos.jobspec import ModelSpec
from strategies.faults_torch import UserCodeError
from strategies.model_torch import build_unloaded, prepare


@dataclass(frozen=True, slots=True)
class Named:
    """The tensors of a model's state dict, each once, and the other names of tied ones."""

    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]


def build_hollow(spec: ModelSpec, code_dir: Path | None, weights_path: Path | None, seed: int) -> nn.Module:
    """Raises SpecError when the model cannot be built that way, or has what cannot be cut over ranks.

    A .pt2 file is the exception to taking no memory: torch reads the whole of it.
    """
    prepare(spec, code_dir, weights_path)
    try:
        with _parameters_on_meta():
            model = build_unloaded(spec, code_dir, weights_path, seed)
    except UserCodeError as error:
        cause = str(error.__cause__).strip().splitlines() or [type(error.__cause__).__name__]
        raise SpecError(
            f"{spec.source} cannot be built without memory for its weights: {cause[0][:300]}",
            "initialise parameters with torch.nn.init, without reading their values, or use a strategy that holds the "
            "whole model on each node",
            code=ErrorCode.MODEL_UNUSABLE,
        ) from error
    sparse = [name for name, module in model.named_modules() if getattr(module, "sparse", False)]
    if sparse:
        raise SpecError(
            f"{sparse[0]} has sparse gradients, which cannot be cut over ranks",
            "build the embedding with sparse=False",
            code=ErrorCode.MODEL_UNUSABLE,
        )
    return model


def named_tensors(model: nn.Module) -> Named:
    """In the order of the state dict."""
    every: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    every |= dict(model.named_buffers(remove_duplicate=False))
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name in model.state_dict():
        if name not in every:
            continue
        known = first.setdefault(id(every[name]), name)
        if known == name:
            tensors[name] = every[name]
        else:
            aliases[name] = known
    return Named(tensors, aliases)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that registers a tensor, and the tensor's own name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    hollow: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # the same parameter may be registered again

    def turn(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta or nn.parameter.is_lazy(parameter):
            return None
        if parameter not in hollow:
            hollow[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        made: nn.Parameter = hollow[parameter]
        return made

    hook: Any = turn
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
