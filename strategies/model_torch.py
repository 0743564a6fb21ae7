"""The user's model: their FILE.py:FUNCTION called in this worker, and weights to start from.

Owns the import of the user's files (siblings are importable) and the check that weights fit. Refuses pickled modules:
weights are safetensors or a state dict read with `weights_only=True`. The seed is set before the function is called, so
the same spec gives the same initial weights on every rank.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from protos.errors import ErrorCode, SpecError
from protos.jobspec import ModelSpec, entry_point
from strategies.faults_torch import UserCodeError


def build(spec: ModelSpec, code_dir: Path | None, weights_path: Path | None, seed: int) -> nn.Module:
    """The module with its starting weights, on the CPU. Raises SpecError, or UserCodeError from the user's function."""
    if entry_point(spec.source) is None:
        raise SpecError(
            f"the model source {spec.source!r} cannot be trained",
            "give model.source as FILE.py:FUNCTION returning an nn.Module, and the file as model.weights",
            code=ErrorCode.UNSUPPORTED,
        )
    function = load_function(spec.source, code_dir)
    torch.manual_seed(seed)
    try:
        model = function(**spec.args)
    except Exception as error:
        raise UserCodeError(f"building the model with {spec.source}") from error
    if not isinstance(model, nn.Module):
        raise SpecError(
            f"{spec.source} returned {type(model).__name__}, not a torch.nn.Module",
            "return the module itself",
            code=ErrorCode.MODEL_UNUSABLE,
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SpecError(
            f"{spec.source} returned a module without trainable parameters",
            "at least one parameter needs requires_grad=True",
            code=ErrorCode.MODEL_UNUSABLE,
        )
    if weights_path is not None:
        load_weights(model, weights_path)
    return model


def load_function(source: str, code_dir: Path | None) -> Callable[..., Any]:
    """The function an entry point names. Raises SpecError when it is not there, UserCodeError when its file fails."""
    file, name = entry_point(source) or ("", "")
    module = load_module(file, code_dir)
    function = getattr(module, name, None)
    if not callable(function):
        raise SpecError(f"{file} defines no function {name!r}", "check the name", code=ErrorCode.MODEL_UNUSABLE)
    return function  # type: ignore[no-any-return]


def load_module(file: str, code_dir: Path | None) -> ModuleType:
    """The user's file as a module, once per worker; its siblings can be imported by their plain names."""
    path = (code_dir / file).resolve() if code_dir is not None else None
    if path is None or code_dir is None or not path.is_file() or not path.is_relative_to(code_dir.resolve()):
        raise SpecError(
            f"{file} is not among the job's files", "it lies beside the job file", code=ErrorCode.MODEL_UNUSABLE
        )
    sys.dont_write_bytecode = True  # the code folder may be shared by jobs: nothing is written into it
    for folder in (str(path.parent), str(code_dir.resolve())):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if name in sys.stdlib_module_names or (known is not None and not _is_user_module(known)):
        name = f"hive_user_{name}"  # never shadow what torch or the library imports under that name
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise SpecError(f"{file} cannot be imported", "it must be Python source", code=ErrorCode.MODEL_UNUSABLE)
    module = importlib.util.module_from_spec(specification)
    module.__dict__["__hive_user__"] = True
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserCodeError(f"importing {file}") from error
    return module


def load_weights(model: nn.Module, path: Path) -> None:
    """Raises SpecError naming the first keys that are missing, unexpected or of another shape."""
    state = read_weights(path)
    load_state(model, state, path.name)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from safetensors or from torch.save; a training checkpoint's `state_dict`/`model` entry is found."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if len(head) == 9 and head[8:9] == b"{":
            return dict(safetensors.torch.load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, safetensors.SafetensorError) as error:
        raise SpecError(f"{path.name} cannot be read as weights: {_first_line(error)}", _FORMATS, code=_CODE) from None
    except Exception as error:  # pickle.UnpicklingError and whatever a hostile file provokes in the reader
        raise SpecError(f"{path.name} holds more than tensors: {_first_line(error)}", _FORMATS, code=_CODE) from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise SpecError(f"{path.name} is not a state dict", _FORMATS, code=_CODE)
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def load_state(model: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Into a model whose tied tensors may be named once only in `state`."""
    own = model.state_dict()
    by_storage = {address(own[name]): name for name in state if name in own}
    filled = dict(state)
    for name, tensor in own.items():
        if name not in filled and address(tensor) in by_storage:
            filled[name] = state[by_storage[address(tensor)]]
    missing = [name for name in own if name not in filled]
    unexpected = [name for name in filled if name not in own]
    reshaped = [
        f"{name} is {list(filled[name].shape)}, the model has {list(own[name].shape)}"
        for name in own
        if name in filled and filled[name].shape != own[name].shape
    ]
    problems = [
        *([f"missing: {_some(missing)}"] if missing else []),
        *([f"unexpected: {_some(unexpected)}"] if unexpected else []),
        *([f"other shapes: {_some(reshaped)}"] if reshaped else []),
    ]
    if problems:
        raise SpecError(
            f"{what} does not fit the model: {'; '.join(problems)}",
            "give the weights of the same architecture and arguments, or leave model.weights out",
            code=_CODE,
        )
    model.load_state_dict(filled)


def address(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for two names of one tensor (tied weights), different for all others."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return (id(tensor),)
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


_CODE = ErrorCode.MODEL_UNUSABLE
_FORMATS = "give safetensors, or a state dict saved with torch.save(model.state_dict(), FILE)"


def _is_user_module(module: ModuleType) -> bool:
    return bool(module.__dict__.get("__hive_user__"))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
