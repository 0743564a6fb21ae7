"""A TorchScript archive: classes from its code as text, tensors from its pickle as data. No code of it is compiled.

Owns which tensors are parameters: those that a class lists in `__parameters__`, found by walking the saved objects from
the outermost module inwards; a tensor under two names counts once. Written by torch.jit.save from torch 1.2 on.
"""

from __future__ import annotations

import io
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from coordinator.identify import pickle_walk
from coordinator.identify.archive import Archive
from coordinator.identify.layers import Description, Layer, describe, family_of_layers, task_of_class
from coordinator.identify.pickle_walk import Mapping, Object, Tensor
from coordinator.identify.tensors import (
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
    WHAT_HIVE_TRAINS,
    TensorInfo,
    kind_of,
    unusable,
)
from protos.model import ModelProfile

TORCHSCRIPT = "torchscript"
WHY_NOT = (
    "TorchScript carries its own code, which hive does not train yet: give the Python function that builds the module "
    f"and save its weights with torch.save(model.state_dict(), 'weights.pt'). {WHAT_HIVE_TRAINS}"
)
MAX_PICKLE_BYTES = 16 * 1024 * 1024
MAX_CODE_BYTES = 64 * 1024 * 1024
MAX_SOURCES = 20_000
MAX_MODULES = 200_000
_MAX_DEPTH = 60
_DAMAGED = "copy the file again or write it again with torch.jit.save"
_CLASS = re.compile(r"class (\w+)\(")
_LIST = re.compile(r"  __parameters__ = \[(.*)\]")
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')
_MANGLED = re.compile(r"\.___torch_mangle_\d+")
_ATTENDS = ("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention")
_PACKED = "__torch__.torch.classes."  # objects of C++ with weights inside: quantised layers


@dataclass(slots=True)
class _Found:
    """What the code and the objects say."""

    classes: dict[str, frozenset[str]]  # its parameters by the full name of a class
    operators: set[str]
    tensors: list[tuple[TensorInfo, bool, str]]  # parameter or not, and the class that holds it
    names: list[str]  # of the classes of modules
    packed: int = 0
    unlisted: int = 0  # modules whose class says nothing of parameters


def matches(names: frozenset[str]) -> bool:
    return "constants.pkl" in names and any(name.startswith("code/") for name in names)


def read(archive: Archive) -> ModelProfile:
    """The profile of a TorchScript archive. Raises SpecError (MODEL_UNUSABLE)."""
    prefix = next(name for name in archive.entries if name.endswith("constants.pkl")).removesuffix("constants.pkl")
    walked = pickle_walk.walk(io.BytesIO(archive.read(f"{prefix}data.pkl", MAX_PICKLE_BYTES)))
    classes, operators = _code(archive, f"{prefix}code/")
    found = _Found(classes, operators, [], [])
    if not isinstance(walked.value, Object):
        raise unusable("the TorchScript archive does not hold a module", _DAMAGED)
    for storage in walked.storages.values():
        if archive.stored_bytes(f"{prefix}data/{storage.key}") < storage.bytes:
            raise unusable("the archive stores less than the tensors it lists", _DAMAGED)
    _gather(walked.value, found)
    constants = _tensors_in(
        pickle_walk.walk(io.BytesIO(archive.read(f"{prefix}constants.pkl", MAX_PICKLE_BYTES))).value
    )
    return describe(_description(walked.value, found, constants, archive, prefix))


def _code(archive: Archive, folder: str) -> tuple[dict[str, frozenset[str]], set[str]]:
    """The parameters of each class, and the operators of attention that the code calls."""
    classes: dict[str, frozenset[str]] = {}
    operators: set[str] = set()
    names = [name for name in archive.entries if name.startswith(folder) and name.endswith(".py")]
    left = MAX_CODE_BYTES
    if len(names) > MAX_SOURCES:
        raise unusable(f"{len(names)} files of code are over the limit of {MAX_SOURCES}", _DAMAGED)
    for name in names:
        text = archive.read(name, left).decode("utf-8", "replace")
        left -= len(text)
        module = name.removeprefix(folder).removesuffix(".py").replace("/", ".")
        operators |= {word for word in _ATTENDS if word in text}
        current = ""
        for line in text.splitlines():
            if line.startswith("class ") and (head := _CLASS.match(line)):
                current = f"{module}.{head[1]}"
            elif current and line.startswith("  __parameters__") and (listed := _LIST.match(line)):
                classes[current] = frozenset(_TEXT.findall(listed[1]))
    return classes, operators


def _gather(root: Object, found: _Found) -> None:
    """Goes through the modules once each, whatever refers to them how often."""
    seen: set[int] = {id(root)}
    todo: list[tuple[str, Object, int]] = [("", root, 0)]
    while todo:
        path, module, depth = todo.pop()
        name = str(module.type)
        if name.startswith(_PACKED):
            found.packed += 1
            continue
        said = found.classes.get(name)
        found.names.append(_MANGLED.sub("", name))
        inner: list[tuple[str, Object, int]] = []
        has_tensors = False
        for key, value in module.attributes.items():
            here = f"{path}.{key}" if path else str(key)
            if len(here) > MAX_NAME_CHARACTERS or depth > _MAX_DEPTH or len(found.tensors) > MAX_TENSORS:
                raise unusable("the TorchScript archive nests too deep or has names too long", _DAMAGED)
            if isinstance(value, Tensor):
                has_tensors = True
                tensor = value.info(here)
                learned = key in said if said is not None else tensor.is_parameter
                found.tensors.append((tensor, learned, name))
            elif isinstance(value, Object) and id(value) not in seen:
                seen.add(id(value))
                inner.append((here, value, depth + 1))
        found.unlisted += has_tensors and said is None
        if len(seen) > MAX_MODULES:
            raise unusable(f"the TorchScript archive has more than {MAX_MODULES} modules", _DAMAGED)
        todo += reversed(inner)


def _tensors_in(value: object) -> list[TensorInfo]:
    """Tensors in lists, tuples and mappings, not deeper than constants are."""
    found: list[TensorInfo] = []
    todo: list[tuple[object, int]] = [(value, 0)]
    steps = 0
    while todo:
        here, depth = todo.pop()
        steps += 1
        if isinstance(here, Tensor):
            found.append(here.info(f"constant {len(found)}"))
        elif depth < 8 and steps < MAX_MODULES:
            todo += [(each, depth + 1) for each in reversed(list(_inside(here)))]
    return found


def _inside(value: object) -> Iterator[object]:
    if isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, Mapping):
        yield from value.items.values()
    elif isinstance(value, Object):
        yield from value.arguments


def _description(
    root: Object, found: _Found, constants: list[TensorInfo], archive: Archive, prefix: str
) -> Description:
    layers: dict[str, Layer] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    classes: dict[str, str] = {}
    counted: set[Hashable] = set()
    dtypes: set[str] = set()
    for tensor, learned, holder in found.tensors:
        path, _, leaf = tensor.name.rpartition(".")
        shapes.setdefault(path, {})[leaf] = tensor.shape
        classes[path] = _MANGLED.sub("", holder)
        dtypes.add(tensor.dtype)
        if learned:
            layers.setdefault(path, Layer(path or "model", "")).count(tensor, counted)
    for path, layer in layers.items():
        layer.kind = _kind(path, classes[path], shapes[path])
    listed = list(layers.values())
    parameters = sum(layer.parameters for layer in listed)
    description = Description(
        framework="pytorch",
        file_format=TORCHSCRIPT,
        file_bytes=archive.size,
        why_not=WHY_NOT,
        layers=listed,
        parameters=parameters,
        dtypes=dtypes,
        family=family_of_layers(listed, (name.rpartition(".")[2] for name in found.names), bool(found.operators)),
        task=next(filter(None, map(task_of_class, found.names)), ""),
        input_shape=_traced_input(archive, prefix),
        notes=[f"class {_MANGLED.sub('', str(root.type)).removeprefix('__torch__.')[:200]}"],
    )
    _say_what_is_left(description, found, constants)
    return description


def _say_what_is_left(description: Description, found: _Found, constants: list[TensorInfo]) -> None:
    frozen = sum(each.elements for each in constants if each.is_parameter and each.elements > 1)
    if found.packed:
        description.unknown.append("parameters")
        description.notes.append(f"{found.packed} objects of packed, quantised weights are not counted")
    if found.unlisted:
        description.unknown.append("parameters")
        description.notes.append(f"{found.unlisted} classes do not list their parameters: counted by name and type")
    if frozen and not description.parameters:
        description.unknown.append("parameters")
        description.parameters = frozen
        description.dtypes |= {each.dtype for each in constants}
        description.notes.append("the module was frozen: its parameters are among constants, which are counted here")


def _kind(path: str, holder: str, tensors: dict[str, tuple[int, ...]]) -> str:
    name = holder.rpartition(".")[2]
    if holder.startswith("__torch__.torch.nn."):
        return "Linear" if name == "NonDynamicallyQuantizableLinear" else name
    guessed = kind_of(path, tensors)
    return name if guessed == "Module" else guessed


def _traced_input(archive: Archive, prefix: str) -> tuple[int, ...] | None:
    """The shape of one sample of the first input that a traced module was traced with, where that is kept."""
    name = f"{prefix}traced_inputs.pkl"
    if name not in archive.entries:
        return None
    tensors = _tensors_in(pickle_walk.walk(io.BytesIO(archive.read(name, MAX_PICKLE_BYTES))).value)
    return tensors[0].shape[1:] if tensors and tensors[0].shape else None
