"""Weights to start from: a state dict in safetensors (one file, or several with an index) or saved by torch.save.

Owns reading them, whole or tensor by tensor, and the check that they fit a model. Refuses pickled modules: what is not
safetensors is read with `weights_only=True`. A tensor with several names in the model may be named once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from protos.errors import ErrorCode, SpecError

INDEX_SUFFIX = ".safetensors.index.json"
_CODE = ErrorCode.MODEL_UNUSABLE
_FORMATS = "give safetensors, or a state dict saved with torch.save(model.state_dict(), FILE)"
_MAX_INDEX_BYTES = 64 << 20


class Weights(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for; `shape` reads none."""

    def __init__(self, files: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._files = files  # safetensors readers by name of tensor
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name].detach().clone()
        value: Tensor = self._files[name].get_tensor(name)
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._tensors:
            return tuple(self._tensors[name].shape)
        return tuple(self._files[name].get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter((*self._files, *self._tensors))

    def __len__(self) -> int:
        return len(self._files) + len(self._tensors)


@contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """A file of safetensors, the index of several beside it, or what torch.save wrote. Raises SpecError."""
    with ExitStack() as open_files:
        try:
            if path.name.endswith(INDEX_SUFFIX):
                weights = Weights(_sharded(path, open_files), {})
            elif _is_safetensors(path):
                reader = open_files.enter_context(safetensors.safe_open(path, framework="pt"))
                weights = Weights(dict.fromkeys(reader.keys(), reader), {})
            else:
                weights = Weights({}, _saved(path))
        except SpecError:
            raise
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, safetensors.SafetensorError) as error:
            raise _unreadable(path, error) from None
        yield weights


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{"


def _sharded(path: Path, open_files: ExitStack) -> dict[str, Any]:
    """The readers that an index names; each file lies beside it."""
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise ValueError("the index is too large")
    index = json.loads(path.read_text())
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict):
        raise ValueError("the index has no weight_map")
    readers: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"the index names {file!r}, which is not beside it")
        if file not in readers:
            readers[file] = open_files.enter_context(safetensors.safe_open(path.parent / file, framework="pt"))
        found[str(name)] = readers[file]
    return found


def _saved(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path))
    except (OSError, RuntimeError, ValueError, EOFError):
        raise
    except Exception as error:  # pickle.UnpicklingError and whatever a hostile file provokes in the reader
        raise SpecError(f"{path.name} holds more than tensors: {_first_line(error)}", _FORMATS, code=_CODE) from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if isinstance(content, dict) and not all(isinstance(value, Tensor) for value in content.values()):
        content = _largest_part(content)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise SpecError(f"{path.name} is not a state dict", _FORMATS, code=_CODE)
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _largest_part(checkpoint: dict[Any, Any]) -> dict[Any, Any] | None:
    """The model's tensors in a checkpoint that has a name of its own for them. An optimizer's state is no such part."""
    parts = [
        part
        for key, part in checkpoint.items()
        if isinstance(part, dict) and part and all(isinstance(value, Tensor) for value in part.values())
        if not any(word in str(key).lower() for word in ("optim", "scheduler", "scaler"))
    ]
    return max(parts, key=lambda part: sum(value.nbytes for value in part.values()), default=None)


def _is_archive(path: Path) -> bool:
    """Written by a torch that can map it, not by one before 1.6."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unreadable(path: Path, error: BaseException) -> SpecError:
    return SpecError(f"{path.name} cannot be read as weights: {_first_line(error)}", _FORMATS, code=_CODE)


def load_weights(model: nn.Module, path: Path) -> None:
    """Raises SpecError naming the first keys that are missing, unexpected or of another shape."""
    with open_weights(path) as weights:
        source = fitting(model, weights, path.name)
        own = model.state_dict()
        with torch.no_grad():
            for name, given in source.items():
                own[name].copy_(weights[given])


def fitting(model: nn.Module, weights: Weights, what: str) -> dict[str, str]:
    """For each entry of the model's state dict the name of its weights. Raises SpecError when they do not fit."""
    own = model.state_dict(keep_vars=True)
    first_given = {address(own[name]): name for name in weights if name in own}
    source = {
        name: name if name in weights else first_given[address(tensor)]
        for name, tensor in own.items()
        if name in weights or address(tensor) in first_given
    }
    missing = [name for name in own if name not in source]
    unexpected = [name for name in weights if name not in own]
    reshaped = [
        f"{name} is {list(weights.shape(given))}, the model has {list(own[name].shape)}"
        for name, given in source.items()
        if weights.shape(given) != tuple(own[name].shape)
    ]
    problems = [
        *([f"missing: {some(missing)}"] if missing else []),
        *([f"unexpected: {some(unexpected)}"] if unexpected else []),
        *([f"other shapes: {some(reshaped)}"] if reshaped else []),
    ]
    if problems:
        raise SpecError(
            f"{what} does not fit the model: {'; '.join(problems)}",
            "give the weights of the same architecture and arguments, or leave model.weights out",
            code=_CODE,
        )
    return source


def address(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two names of one tensor (tied weights), different for all others."""
    if tensor.numel() == 0 or tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
        return (id(tensor),)
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
