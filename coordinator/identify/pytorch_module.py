"""A torch.nn.Module that was pickled whole, looked into as a record: its layers by class and their exact parameters.

A module is an object with `_parameters` and `_modules`. Nothing of it is built; it is never loaded by hive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from coordinator.identify.layers import Layer, family_of_layers
from coordinator.identify.pickle_values import Mapping, Object, Tensor
from coordinator.identify.tensors import MAX_NAME_CHARACTERS, MAX_TENSORS, unusable
from protos.model import Family

_DAMAGED = "save the weights alone: torch.save(model.state_dict(), PATH)"
_LINEAR = ("Linear", "LazyLinear", "NonDynamicallyQuantizableLinear")


@dataclass(frozen=True, slots=True)
class ModuleContent:
    architecture: str
    layers: tuple[Layer, ...]
    parameters: int
    dtypes: frozenset[str]
    tensors: dict[str, Tensor]
    family: Family
    confidence: float


def is_module(value: Any) -> bool:
    if not isinstance(value, Object):
        return False
    attributes = value.attributes
    return isinstance(attributes.get("_parameters"), Mapping) and isinstance(attributes.get("_modules"), Mapping)


def module_content(root: Object) -> ModuleContent:
    """What `root` holds. Raises SpecError for tensors that claim more than is stored and for modules without end."""
    layers: list[Layer] = []
    words: list[str] = []
    tensors: dict[str, Tensor] = {}
    seen: set[Any] = set()
    total = 0
    for path, module in _modules(root):
        words.append(module.type.name)
        count, owns = 0, False
        for name, value in module.attributes["_parameters"].items.items():
            if not isinstance(value, Tensor):
                continue
            owns = True
            full = f"{path}.{name}".lstrip(".")
            tensors[full] = value
            info = value.info(full)
            if info.identity not in seen:
                seen.add(info.identity)
                count += info.elements
        for name, value in _buffers(module):
            tensors.setdefault(f"{path}.{name}".lstrip("."), value)
        total += count
        if owns:
            layers.append(Layer(path or "model", _kind(module), count))
    if len(tensors) > MAX_TENSORS:
        raise unusable(f"{len(tensors)} tensors are over the limit of {MAX_TENSORS}", _DAMAGED)
    family, confidence = family_of_layers(layers, words)
    dtypes = frozenset(tensor.dtype for tensor in tensors.values())
    return ModuleContent(str(root.type), tuple(layers), total, dtypes, tensors, family, confidence)


def _kind(module: Object) -> str:
    name = module.type.name.rpartition(".")[2]
    return "Linear" if name in _LINEAR else name


def _buffers(module: Object) -> Iterator[tuple[Any, Tensor]]:
    buffers = module.attributes.get("_buffers")
    if isinstance(buffers, Mapping):
        for name, value in buffers.items.items():
            if isinstance(value, Tensor):
                yield name, value


def _modules(root: Object) -> Iterator[tuple[str, Object]]:
    """Every module once, before those in it, as `named_modules` goes."""
    seen = {id(root)}
    waiting = [("", root)]
    while waiting:
        path, module = waiting.pop()
        yield path, module
        below = []
        for name, item in module.attributes["_modules"].items.items():
            if is_module(item) and id(item) not in seen:
                full = f"{path}.{name}".lstrip(".")
                if len(full) > MAX_NAME_CHARACTERS or len(seen) > MAX_TENSORS:
                    raise unusable("the modules in the file are nested without end", _DAMAGED)
                seen.add(id(item))
                below.append((full, item))
        waiting += reversed(below)
