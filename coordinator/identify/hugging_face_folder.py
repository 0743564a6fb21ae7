"""A Hugging Face directory by its bytes: the configuration, and the headers of its safetensors.

Owns the agreement of an index with its shards: every file that it names is there, and holds exactly the tensors that it
says. Parameters are those that are stored, exactly. Without weights only a node can count them, by building the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from coordinator.identify import safetensors_header
from coordinator.identify.folder import Folder
from coordinator.identify.tensors import (
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
    WHAT_HIVE_TRAINS,
    TensorInfo,
    foreign,
    profile_of,
    unusable,
)
from coordinator.identify.text_file import HUGGING_FACE
from protos.errors import SpecError
from protos.model import ModelProfile
from protos.printable import printable
from strategies.hugging_face import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    WEIGHTS_FILE,
    check_config,
    check_sizes,
    is_beside,
    task_of,
)

ADAPTER = "hugging_face_adapter"
_ADAPTER_FILE = "adapter_config.json"
_AGAIN = "fetch the directory again"
_NEEDS_NODE = "its layers are found out on a node, by building it"
_QUANTISED = ("quantization_config", "compression_config")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def matches(names: frozenset[str]) -> bool:
    return bool(names & {CONFIG_FILE, INDEX_FILE, _ADAPTER_FILE}) or any(_top(name, ".safetensors") for name in names)


def read(folder: Folder) -> ModelProfile:
    """Raises SpecError for a configuration, an index or a shard that is damaged or lies."""
    if _ADAPTER_FILE in folder.files:
        return _adapter(folder)
    tensors = _tensors(folder)
    if CONFIG_FILE not in folder.files:
        if not tensors:
            raise unusable("the directory holds an adapter or an index without its weights", _AGAIN)
        return _weighed(folder, tensors, "safetensors", f"weights without a {CONFIG_FILE}. {WHAT_HIVE_TRAINS}")
    config = folder.read_json(CONFIG_FILE, MAX_CONFIG_BYTES)
    check_sizes(config)
    why_not = _refusal(config)
    kind = str(config.get("model_type", ""))[:MAX_NAME_CHARACTERS]
    if tensors:
        found = _weighed(folder, tensors, HUGGING_FACE, why_not)
        found = replace(found, notes=(*found.notes, f"model_type {kind}"))
        if quantised := _quantised(config):
            unknown = tuple(dict.fromkeys((*found.unknown, "parameters")))
            found = replace(found, unknown=unknown, notes=(*found.notes, quantised))
    else:
        found = foreign("pytorch", HUGGING_FACE, folder.total_bytes, why_not or _NEEDS_NODE, architecture=kind)
        found = replace(found, notes=(_without_weights(folder),))
    found = replace(found, notes=(*found.notes, *_beside(folder), *_code(folder)), trainable=not why_not)
    task = task_of(config)
    if task is None:
        return found
    return replace(found, task=task, unknown=tuple(name for name in found.unknown if name != "task"))


def _refusal(config: Mapping[str, Any]) -> str:
    """Why hive does not train such a configuration, or nothing: what it holds can be said all the same."""
    try:
        check_config(config)
    except SpecError as error:
        return f"{error.message}: {error.hint}"
    return ""


def _quantised(config: Mapping[str, Any]) -> str:
    """What a configuration says of weights that are packed; nothing for others."""
    parts = [config, *(each for each in config.values() if isinstance(each, dict))]
    found = next((part[key] for part in parts for key in _QUANTISED if part.get(key)), None)
    if found is None:
        return ""
    method = found.get("quant_method") if isinstance(found, dict) else None
    by = f" by {printable(method[:40])}" if isinstance(method, str) else ""
    return f"quantised{by}, says {CONFIG_FILE}: the count is of what is stored, not of what was packed"


def _beside(folder: Folder) -> tuple[str, ...]:
    """Another form of the model in the same directory, which is not looked into."""
    found = [ascii(name)[1:-1][:80] for name in sorted(folder.sizes) if _top(name, ".onnx")]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (f"{found[0]}{more} beside it was not looked at: name the file to identify it",) if found else ()


def _code(folder: Folder) -> tuple[str, ...]:
    python = sum(name.endswith(".py") for name in folder.sizes)
    return (f"{python} Python files lie in it, which hive never runs",) if python else ()


def _without_weights(folder: Folder) -> str:
    if any(_top(name, *_PICKLED) for name in folder.sizes):
        return "its weights are pickled, and loading a pickle runs code: hive reads safetensors only"
    return "no weights"


def _top(name: str, *suffixes: str) -> bool:
    return "/" not in name and name.endswith(suffixes)


def _adapter(folder: Folder) -> ModelProfile:
    config = folder.read_json(_ADAPTER_FILE, MAX_CONFIG_BYTES)
    base = ascii(str(config.get("base_model_name_or_path", "?")))[1:-1][:MAX_NAME_CHARACTERS]
    why_not = f"an adapter of {base}: merge it into that model, and save the whole model as safetensors"
    tensors = _tensors(folder)
    if not tensors:
        return foreign("pytorch", ADAPTER, folder.total_bytes, why_not)
    return _weighed(folder, tensors, ADAPTER, why_not)


def _weighed(folder: Folder, tensors: list[TensorInfo], file_format: str, why_not: str) -> ModelProfile:
    return profile_of(
        tensors, framework="pytorch", file_format=file_format, file_bytes=folder.total_bytes, why_not=why_not,
    )  # fmt: skip


def _tensors(folder: Folder) -> list[TensorInfo]:
    """Of the weights that transformers would load: one file, the shards of an index, or all there are."""
    if WEIGHTS_FILE in folder.files:
        return _of_file(folder, WEIGHTS_FILE)
    if INDEX_FILE in folder.files:
        return _of_index(folder)
    found: dict[str, TensorInfo] = {}
    for name in sorted(folder.files):
        if name.endswith(".safetensors"):
            _add(found, name, _of_file(folder, name))
    return list(found.values())


def _of_file(folder: Folder, name: str) -> list[TensorInfo]:
    folder.files[name].seek(0)
    if not safetensors_header.looks_like(folder.files[name].read(16), folder.sizes[name]):
        raise unusable(f"{name} is not safetensors", "hive loads no other weights: fetch the directory again")
    try:
        return safetensors_header.read(folder.files[name], folder.sizes[name])
    except SpecError as error:
        raise unusable(f"{name}: {error.message}", error.hint) from None


def _of_index(folder: Folder) -> list[TensorInfo]:
    where = folder.read_json(INDEX_FILE, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(where, dict) or not where or len(where) > MAX_TENSORS:
        raise unusable(f"{INDEX_FILE} has no weight_map of a possible size", _AGAIN)
    shards: dict[str, set[str]] = {}
    for tensor, file in where.items():
        if not is_beside(file):
            raise unusable(f"{INDEX_FILE} names {str(file)[:80]!a}, which is no .safetensors file beside it")
        shards.setdefault(file, set()).add(tensor)
    found: dict[str, TensorInfo] = {}
    for file, named in sorted(shards.items()):
        if file not in folder.files:
            raise unusable(f"{INDEX_FILE} names {file[:80]!a}, which is missing", _AGAIN)
        held = _of_file(folder, file)
        names = {tensor.name for tensor in held}
        if names != named:
            one = ascii(min(names ^ named)[:80])
            raise unusable(f"{INDEX_FILE} and {file} do not hold the same tensors: {one}", _AGAIN)
        _add(found, file, held)
    return list(found.values())


def _add(found: dict[str, TensorInfo], file: str, held: list[TensorInfo]) -> None:
    for tensor in held:
        if tensor.name in found:
            raise unusable(f"tensor {tensor.name[:80]!a} is in {file} and in another file too", _AGAIN)
        found[tensor.name] = tensor
    if len(found) > MAX_TENSORS:
        raise unusable(f"over {MAX_TENSORS} tensors")
