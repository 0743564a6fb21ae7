"""One forward pass watched: which module ran, what it computed, saved for backward and returned.

Owns the tracing only; what the numbers mean for a plan is profile_torch's. A layer here is any module that holds
parameters itself or in which an operation ran that costs something: work is booked on the innermost module running.
Invariants: every parameter is counted once, however many modules share it; two traces of different batch sizes give
per-sample figures without their constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.export.unflatten import InterpreterModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from protos.model import LayerProfile


@dataclass(slots=True)
class ModuleTrace:
    """What one module did in one forward pass, summed over its calls."""

    kind: str
    flops: float = 0.0
    saved_bytes: int = 0
    output_bytes: int = 0
    output_shape: tuple[int, ...] | None = None
    recurrent_flops: float = 0.0
    wanted_bytes: int = 0  # of its inputs of which a gradient is wanted


@dataclass(slots=True)
class Trace:
    """All modules in the order they first ran, and what the whole model returned."""

    modules: dict[str, ModuleTrace] = field(default_factory=dict)
    output: Any = None
    attention: bool = False  # a fused attention operation ran


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Of the fused CPU kernel, which torch's own counter does not know: two batched products."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[-2] * (width + value[-1]))


_FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_DEPTH_LIMIT = 8
LOSS = "(loss)"  # never a module's name: those have no brackets


class _FlopMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, book: Callable[[float], None], trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._book = book
        self._trace = trace

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function._overloadpacket
        if packet is _FUSED_ATTENTION:
            self._trace.attention = True
            self._book(_attention_flops(*(tuple(tensor.shape) for tensor in args[:3])))
        elif packet in flop_registry:
            self._trace.attention |= "scaled_dot_product" in str(packet)
            self._book(float(flop_registry[packet](*args, **kwargs, out_val=result)))
        return result


def recurrent_flops(module: nn.Module, steps: int) -> float:
    """Closed form of LSTM, GRU and RNN for `steps` = batch x length: two products per gate, layer and direction."""
    if not isinstance(module, nn.RNNBase):
        return 0.0
    weights = [value for name, value in module.named_parameters(recurse=False) if name.startswith("weight_")]
    return float(sum(2 * weight.shape[0] * weight.shape[1] for weight in weights) * steps)


def trace(model: nn.Module, forward: Callable[[], Any], loss: Callable[[Any], object]) -> Trace:
    """Run `forward`, then `loss` of what it returned, and book what happened. Raises what they raise."""
    result = Trace()
    running: list[str] = [""]
    names = {id(module): name for name, module in model.named_modules()}
    owned = {tensor.untyped_storage()._cdata for tensor in _tensors_of(model)}
    seen: dict[int, torch.Tensor] = {}  # keeps the storages alive, so that an address means one storage

    def entry(name: str) -> ModuleTrace:
        if name not in result.modules:
            kind = LOSS if name == LOSS else kind_of(model.get_submodule(name))
            result.modules[name] = ModuleTrace(kind)
        return result.modules[name]

    def before(module: nn.Module, arguments: Any) -> None:
        running.append(names[id(module)])
        inputs = [tensor for tensor in tensors_in(arguments) if tensor.requires_grad]
        entry(running[-1]).wanted_bytes += sum(tensor.numel() * tensor.element_size() for tensor in inputs)

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        done = entry(running.pop())
        tensors = list(tensors_in(output))
        done.output_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        done.output_shape = tuple(tensors[0].shape) if tensors else None
        if isinstance(module, nn.RNNBase) and arguments and isinstance(arguments[0], torch.Tensor):
            width = arguments[0].shape[-1]
            done.recurrent_flops += recurrent_flops(module, arguments[0].numel() // max(width, 1))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in owned and key not in seen:
            seen[key] = tensor
            entry(running[-1]).saved_bytes += tensor.untyped_storage().nbytes()
        return tensor

    def book(flops: float) -> None:
        entry(running[-1]).flops += flops

    with _hooks(model, before, after), saved_tensors_hooks(pack, lambda tensor: tensor), _FlopMode(book, result):
        result.output = forward()
        running.append(LOSS)
        loss(result.output)
    return result


def kind_of(module: nn.Module) -> str:
    """Class name; of a module of an exported file the name its class had."""
    exported = module.type_name() if isinstance(module, InterpreterModule) else None
    return exported.rpartition(".")[2] if exported else type(module).__name__


@contextmanager
def _hooks(model: nn.Module, before: Any, after: Any) -> Iterator[None]:
    handles = []
    for module in set(model.modules()):
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """The tensors inside a module's answer: tensors, sequences, mappings and Hugging Face style outputs."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < _DEPTH_LIMIT and isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth + 1)
    elif depth < _DEPTH_LIMIT and isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item, depth + 1)


def _tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def layers(model: nn.Module, first: Trace, second: Trace, batches: tuple[int, int]) -> tuple[LayerProfile, ...]:
    """Per-sample figures from two traces of batch sizes `batches`: the slope, which drops constants."""
    grow = batches[1] - batches[0]
    parameters = own_parameters(model, tuple(first.modules))
    profiles = []
    for name, small in first.modules.items():
        if name == LOSS:
            continue
        large = second.modules.get(name, small)
        flops = max(_flops(large) - _flops(small), 0.0) / grow
        saved = max(large.saved_bytes - small.saved_bytes, 0) / grow
        if not (parameters[name] or flops or saved):
            continue
        profiles.append(
            LayerProfile(
                name=name or "model",
                kind=small.kind,
                parameters=parameters[name],
                flops_per_sample=flops,
                activation_bytes_per_sample=saved,
                output_bytes_per_sample=max(large.output_bytes - small.output_bytes, 0) / grow,
                output_shape=_sample_shape(small.output_shape, large.output_shape),
            )
        )
    return tuple(profiles)


def wanted_bytes(first: Trace, second: Trace, batches: tuple[int, int]) -> dict[str, float]:
    """Of every module that ran: bytes per sample of its inputs of which a gradient is wanted."""
    grow = batches[1] - batches[0]
    return {
        name: max(second.modules.get(name, small).wanted_bytes - small.wanted_bytes, 0) / grow
        for name, small in first.modules.items()
    }


def loss_bytes(first: Trace, second: Trace, batches: tuple[int, int]) -> float:
    """What the loss keeps for its backward pass, per sample: log-probabilities of a large vocabulary, mostly."""
    small, large = first.modules.get(LOSS), second.modules.get(LOSS)
    if small is None or large is None:
        return 0.0
    return max(large.saved_bytes - small.saved_bytes, 0) / (batches[1] - batches[0])


def _flops(module: ModuleTrace) -> float:
    return max(module.flops, module.recurrent_flops)


def _sample_shape(small: tuple[int, ...] | None, large: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape without the dimension that grew with the batch."""
    if small is None or large is None or len(small) != len(large):
        return ()
    grew = [index for index, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    return tuple(size for index, size in enumerate(small) if index not in grew[:1])


def own_parameters(model: nn.Module, names: tuple[str, ...]) -> dict[str, int]:
    """Parameters by the module that ran: of a module that never ran itself, by the nearest ancestor that did."""
    counted: set[int] = set()
    result = dict.fromkeys(names, 0)
    for name, module in model.named_modules():
        mine = [value for value in module.parameters(recurse=False) if id(value) not in counted]
        counted.update(id(value) for value in mine)
        home = name
        while home not in result and home:
            home = home.rpartition(".")[0]
        result[home] = result.get(home, 0) + sum(value.numel() for value in mine)
    return result


def parameter_count(model: nn.Module) -> int:
    """Exact, shared parameters counted once."""
    return sum(value.numel() for value in model.parameters())


def parameter_bytes(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.parameters())
