"""A torch.export program (.pt2) from the JSON that describes it, without torch: parameters, shapes, layers, FLOPs.

Owns the archive of torch 2.10 and newer (models/model.json and the lists of weights) and the older one, which is
recognised and described but cannot be trained by hive. Nothing that the program holds is evaluated: sizes that are
expressions count by the example they were exported with. A node identifies a program that is trained further.
"""

from __future__ import annotations

import io
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coordinator.identify.archive import Archive, open_archive
from coordinator.identify.exported_graph import ITEM_BYTES, ExportedGraph, Value, read_graph, read_value
from coordinator.identify.layers import Description, Layer, describe, family_of_layers, task_of_class
from coordinator.identify.pickle_file import refuse_harmful
from coordinator.identify.tensors import (
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
    WHAT_HIVE_TRAINS,
    TensorInfo,
    check_shape,
    foreign,
    kind_of,
    unusable,
)
from protos.model import ModelProfile

EXPORTED = "pytorch_export"
EXPORTED_OLD = "pytorch_export_old"
MAX_DOCUMENT_BYTES = 24 * 1024 * 1024
WHY = "a torch.export program: a node runs it once and identifies it further"
_OLD = (
    "a torch.export program of an older torch: load it with the torch that wrote it, and write it with "
    "torch.export.save of torch 2.10 or newer"
)
_COMPILED = (
    "a compiled package carries its own code, which hive does not train: give the Python function that builds the "
    f"module and save its weights with torch.save(model.state_dict(), 'weights.pt'). {WHAT_HIVE_TRAINS}"
)
_PROGRAM, _OLD_PROGRAM = "models/model.json", "serialized_exported_program.json"
_WEIGHTS = "data/weights/model_weights_config.json"
_AGAIN = "write it again with torch.export.save"
_SAVED = ".pt"  # what torch.save wrote beside the program: example inputs, and weights that are no plain tensors
_MAX_SAVED_BYTES = 16 * 1024 * 1024


def matches(names: frozenset[str]) -> bool:
    return "archive_format" in names or _OLD_PROGRAM in names


def read(archive: Archive) -> ModelProfile:
    """The profile of a .pt2 file of any kind. Raises SpecError (MODEL_UNUSABLE)."""
    _check_saved(archive)
    old = _OLD_PROGRAM in archive.leaves
    if not old and _PROGRAM not in archive.leaves:
        return foreign("pytorch", "pt2", archive.size, _COMPILED)
    file_format, why_not = (EXPORTED_OLD, _OLD) if old else (EXPORTED, WHY)
    leaf = _OLD_PROGRAM if old else _PROGRAM
    try:
        stored = _stored(archive)
        too_large = archive.entries[_entry(archive, leaf)].file_size > MAX_DOCUMENT_BYTES
        graph = _parameters_alone(stored) if too_large else read_graph(_document(archive, leaf))
        weights = _weights(graph, stored)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        note = "its description is not of the form that torch 2.10 to 2.13 write"
        return replace(foreign("pytorch", file_format, archive.size, why_not, notes=(note,)), trainable=not old)
    found = _description(graph, weights, archive.size)
    found.file_format, found.why_not, found.trainable = file_format, why_not, not old
    if too_large:
        found.notes = [f"{leaf} is over {MAX_DOCUMENT_BYTES} bytes and was not read: only parameters are known"]
        found.unknown += [] if stored else ["parameters"]
    elif not stored:
        found.notes.append("a parameter that the program uses under two names counts twice: the file does not say so")
    return describe(found)


def _check_saved(archive: Archive) -> None:
    """Raises SpecError for a harmful pickle beside the program: torch.export.load would read it."""
    for name, entry in archive.entries.items():
        if name.endswith(_SAVED) and entry.file_size <= _MAX_SAVED_BYTES:
            content = archive.read(name, _MAX_SAVED_BYTES)
            if content.startswith(b"PK"):
                inner = open_archive(io.BytesIO(content), len(content))
                for pickled in (each for each in inner.entries if each.endswith("data.pkl")):
                    refuse_harmful(io.BytesIO(inner.read(pickled, _MAX_SAVED_BYTES)))
            else:
                refuse_harmful(io.BytesIO(content))


@dataclass(frozen=True, slots=True)
class _Weight:
    """A line of the list of weights: which entry of the archive holds it."""

    path: str
    is_parameter: bool
    value: Value


def _entry(archive: Archive, leaf: str) -> str:
    names = [name for name in archive.entries if name == leaf or name.partition("/")[2] == leaf]
    if len(names) != 1:
        raise unusable(f"the archive holds {leaf} more than once", _AGAIN)
    return names[0]


def _document(archive: Archive, leaf: str) -> Any:
    try:
        return json.loads(archive.read(_entry(archive, leaf), MAX_DOCUMENT_BYTES))
    except (ValueError, RecursionError):
        raise unusable(f"{leaf} in the archive is not JSON that can be read", _AGAIN) from None


def _stored(archive: Archive) -> dict[str, _Weight]:
    """The list of weights, where there is one; raises SpecError for one that is larger than what is stored for it."""
    if _WEIGHTS not in archive.leaves:
        return {}
    found: dict[str, _Weight] = {}
    folder = _entry(archive, _WEIGHTS).removesuffix(_WEIGHTS)
    for name, entry in _document(archive, _WEIGHTS)["config"].items():
        meta = entry["tensor_meta"]
        value = read_value(name, meta)
        weight = _Weight(str(entry["path_name"]), entry["is_param"] is True, value)
        if not entry.get("use_pickle"):
            held = archive.stored_bytes(f"{folder}data/weights/{weight.path}")
            steps = check_shape(name, (step["as_int"] for step in meta["strides"]))
            reach = 1 + sum((size - 1) * step for size, step in zip(value.shape, steps, strict=True))
            needed = max(reach, value.elements) if weight.is_parameter else reach
            if value.elements and held < needed * ITEM_BYTES.get(value.dtype, 1):
                raise unusable(f"the weight {name[:80]!r} has less bytes in the archive than its shape", _AGAIN)
        found[name] = weight
    return found


def _parameters_alone(stored: Mapping[str, _Weight]) -> ExportedGraph:
    return ExportedGraph(parameters={name: each.value for name, each in stored.items() if each.is_parameter})


def _weights(graph: ExportedGraph, stored: Mapping[str, _Weight]) -> list[TensorInfo]:
    """The parameters by name; two names of one stored tensor have one identity."""
    found: list[TensorInfo] = []
    for name, value in graph.parameters.items():
        if len(name) > MAX_NAME_CHARACTERS or len(found) >= MAX_TENSORS:
            raise unusable("the program's parameters are too many, or their names too long", _AGAIN)
        if name in stored and value.shape != stored[name].value.shape:
            raise unusable(f"the program and its list of weights give {name[:80]!r} two shapes", _AGAIN)
        identity = stored[name].path if name in stored else name
        found.append(TensorInfo(name, value.dtype, value.shape, 0, identity))
    return found


def _description(graph: ExportedGraph, weights: list[TensorInfo], size: int) -> Description:
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    layers: dict[str, Layer] = {}
    counted: set[Hashable] = set()
    for tensor in weights:
        prefix, _, leaf = tensor.name.rpartition(".")
        groups.setdefault(prefix, {})[leaf] = tensor.shape
        layers.setdefault(prefix, Layer(prefix or "model", "")).count(tensor, counted)
    for prefix, layer in layers.items():
        said = graph.classes.get(prefix, "").rpartition(".")
        is_torch = said[0].startswith("torch.nn.modules")
        guessed = kind_of(prefix, groups[prefix])
        layer.kind = said[2] if is_torch or (said[2] and guessed == "Module") else guessed
    names = [name.rpartition(".")[2] for name in graph.classes.values()]
    attends = any("scaled_dot_product" in node.target for node in graph.nodes)
    listed = list(layers.values())
    flops_known, activations_known = graph.measure(layers)
    return Description(
        framework="pytorch",
        file_format=EXPORTED,
        file_bytes=size,
        why_not="",
        layers=listed,
        parameters=sum(layer.parameters for layer in listed),
        dtypes={tensor.dtype for tensor in weights},
        family=family_of_layers(listed, names, attends),
        task=next(filter(None, map(task_of_class, names)), "") or graph.task(),
        input_shape=graph.input_shape,
        flops_known=flops_known,
        activations_known=activations_known,
        notes=[f"{len(graph.nodes)} operators, batch {graph.batch_text}"],
    )
