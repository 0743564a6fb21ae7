"""Layers cut over ranks, as DTensors: what goes into them and comes out of them.

Between the layers of a pair activations are DTensors that know which dimension each rank has a part of, so what the
user's code does with them (views by head, masks, softmax) means what it says, for any plan. Everywhere else activations
are plain tensors, whole and equal on all ranks. A module that holds whole parameters is given whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from strategies.recompute_torch import blocks_of
from strategies.tensor_plan_torch import TensorPlan

_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def cut_layers(model: nn.Module, plan: TensorPlan, mesh: DeviceMesh) -> None:
    """Once the parameters of the plan are DTensors: makes the layers take and give what their neighbours expect."""
    modules = dict(model.named_modules())
    cut: set[int] = set()
    for pair in plan.pairs:
        inputs = _Inputs(mesh, len(pair.columns))
        for name in pair.columns:
            modules[name].register_forward_pre_hook(inputs.whole)
            cut.add(id(modules[name]))
        modules[pair.row].register_forward_pre_hook(inputs.by_features)
        modules[pair.row].register_forward_hook(lambda _, __, output: whole(output))
        cut.add(id(modules[pair.row]))
    for name in (*plan.gathered, *plan.embeddings):
        inputs = _Inputs(mesh)
        modules[name].register_forward_pre_hook(inputs.whole)
        modules[name].register_forward_hook(lambda _, __, output: whole(output))
        cut.add(id(modules[name]))
    for module in model.modules():
        if (
            id(module) not in cut
            and any(True for _ in module.parameters(recurse=False))
            and not list(module.children())
        ):
            module.register_forward_pre_hook(lambda _, args: tuple(whole(each) for each in args))


def whole(value: Any) -> Any:
    """The plain tensor behind a DTensor, equal on every rank; anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    return value.redistribute(placements=[Replicate()] * value.device_mesh.ndim).to_local()


def attend_locally(model: nn.Module) -> None:
    """Before blocks are made to run again in the backward pass: what runs again must attend alike."""
    for module in {id(each): each for each in (*blocks_of(model), model)}.values():
        module.forward = _with_local_attention(module.forward)


def _with_local_attention(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _LocalAttention():
            return forward(*args, **kwargs)

    return run


class _Inputs:
    """Of `sharing` layers with one input: it is made a DTensor once, so that its gradient is summed once."""

    def __init__(self, mesh: DeviceMesh, sharing: int = 1) -> None:
        self._mesh = mesh
        self._sharing = sharing
        self._last: tuple[Tensor, DTensor, int] | None = None  # plain, made of it, for how many layers more

    def whole(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:  # named in the call: it counts as equal on all ranks anyway
            return args
        value = args[0]
        if isinstance(value, DTensor):
            return (value.redistribute(placements=[Replicate()]), *args[1:])
        if self._last is not None and self._last[0] is value:
            _, made, left = self._last
        else:
            made, left = self._replicated(value), self._sharing
        self._last = (value, made, left - 1) if left > 1 else None
        return (made, *args[1:])

    def by_features(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._last = None
        if not args:
            return args
        value = args[0] if isinstance(args[0], DTensor) else self._replicated(args[0])
        return (value.redistribute(placements=[Shard(value.ndim - 1)]), *args[1:])

    def _replicated(self, value: Tensor) -> DTensor:
        return DTensor.from_local(value, self._mesh, [Replicate()], run_check=False)


class _LocalAttention(TorchFunctionMode):
    """Attention by head needs no other rank: torch has no rule for the kernels of some devices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            named = {**dict(zip(_ATTENTION, args, strict=False)), **kwargs}
            if any(isinstance(named[name], DTensor) for name in _ATTENTION[:3]):
                return _attend(named)
        return func(*args, **kwargs)


def _attend(named: dict[str, Any]) -> Tensor:
    query, key, value = (named.pop(name) for name in _ATTENTION[:3])
    mask = named.pop("attn_mask", None)
    heads = query.ndim - 3
    by_head = heads >= 0 and all(
        isinstance(each, DTensor) and each.ndim == query.ndim and each.placements == (Shard(heads),)
        for each in (query, key, value)
    )
    one_for_all = mask is None or (not isinstance(mask, DTensor) and (mask.ndim < 3 or mask.shape[-3] == 1))
    if not by_head or not one_for_all:
        return functional.scaled_dot_product_attention(
            whole(query), whole(key), whole(value), attn_mask=whole(mask), **named
        )
    local = functional.scaled_dot_product_attention(
        query.to_local(), key.to_local(), value.to_local(), attn_mask=mask, **named
    )
    result: Tensor = DTensor.from_local(local, query.device_mesh, [Shard(heads)], run_check=False)
    return result
