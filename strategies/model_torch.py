"""The user's model: their FILE.py:FUNCTION called in this worker, their Hugging Face directory or torch.export file.

Owns the import of the user's files (siblings are importable), and which values the model starts from. The seed is set
before the model is built, so the same spec gives the same initial weights on every rank.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from protos.errors import ErrorCode, SpecError
from protos.jobspec import ModelSpec, entry_point
from strategies.faults_torch import UserCodeError
from strategies.hugging_face import CONFIG_FILE
from strategies.weights_torch import address as address
from strategies.weights_torch import fitting, open_weights
from strategies.weights_torch import load_weights as load_weights

EXPORTED_SUFFIX = ".pt2"


def build(spec: ModelSpec, code_dir: Path | None, weights_path: Path | None, seed: int) -> nn.Module:
    """The module with its starting weights, on the CPU. Raises SpecError, or UserCodeError from the user's function."""
    model = build_unloaded(spec, code_dir, weights_path, seed)
    own = model.state_dict()
    with starting_values(spec, model, code_dir, weights_path) as readers, torch.no_grad():
        for name, read in readers.items():
            own[name].copy_(read())
    return model


def prepare(spec: ModelSpec, code_dir: Path | None, weights_path: Path | None) -> None:
    """Imports what building needs, outside of any mode of torch that the model is then built in. Raises as `build`."""
    directory = model_directory(spec, code_dir, weights_path)
    if directory is not None:
        from strategies import hugging_face_torch

        hugging_face_torch.prepare(directory, spec)
    elif entry_point(spec.source) is not None:
        load_function(spec.source, code_dir)


def build_unloaded(spec: ModelSpec, code_dir: Path | None, weights_path: Path | None, seed: int) -> nn.Module:
    """As `build`, before `starting_values` are put in. A torch.export file always has its own values."""
    file = exported_file(spec, code_dir, weights_path)
    if file is not None:
        from strategies.exported_torch import exported_module  # which needs what is below it: this file

        return exported_module(file)
    directory = model_directory(spec, code_dir, weights_path)
    if directory is not None:
        from strategies import hugging_face_torch

        return hugging_face_torch.build(directory, spec, seed)
    if entry_point(spec.source) is None:
        raise SpecError(
            f"the model source {spec.source!r} cannot be trained",
            "give model.source as FILE.py:FUNCTION returning an nn.Module, a Hugging Face directory with config.json, "
            "or a .pt2 file of torch.export",
            code=ErrorCode.UNSUPPORTED,
        )
    return _called(spec, code_dir, seed)


@contextmanager
def starting_values(
    spec: ModelSpec, model: nn.Module, code_dir: Path | None, weights_path: Path | None
) -> Iterator[Mapping[str, Callable[[], Tensor]]]:
    """For entries of the state dict that do not start as they were built: how to read each, one at a time.

    What is read has the shape and type of the entry. Raises SpecError for weights that do not fit the model.
    """
    if exported_file(spec, code_dir, weights_path) is not None:
        yield {}
        return
    path, directory = weights_path, model_directory(spec, code_dir, weights_path)
    if directory is not None:
        from strategies import hugging_face_torch

        path = hugging_face_torch.weights_file(directory, spec)
    if path is None:
        yield {}
        return
    with open_weights(path) as weights:
        if directory is not None:
            found = hugging_face_torch.readers(model, weights, path.name)
        else:
            source = fitting(model, weights, path.name)
            found = {name: partial(weights.__getitem__, given) for name, given in source.items()}
        types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        yield {name: partial(_of_type, read, types[name]) for name, read in found.items()}


def _of_type(read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return read().to(dtype)


def _called(spec: ModelSpec, code_dir: Path | None, seed: int) -> nn.Module:
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


def exported_file(spec: ModelSpec, code_dir: Path | None, weights_path: Path | None) -> Path | None:
    """Where the torch.export file lies that is the model; None when the model is Python source.

    A model file travels in the place of weights; one that lies beside the job file is found there too.
    """
    if not spec.source.endswith(EXPORTED_SUFFIX):
        return None
    if weights_path is not None:
        return weights_path
    path = (code_dir / spec.source).resolve() if code_dir is not None else None
    if path is None or code_dir is None or not path.is_file() or not path.is_relative_to(code_dir.resolve()):
        raise SpecError(
            f"{spec.source} is not among the job's files", "it lies beside the job file", code=ErrorCode.MODEL_UNUSABLE
        )
    return path


def model_directory(spec: ModelSpec, code_dir: Path | None, weights_path: Path | None) -> Path | None:
    """Where the Hugging Face directory lies that is the model; None when it is none.

    Like a model file it travels in the place of weights; one that lies beside the job file is found there too.
    """
    if entry_point(spec.source) is not None or spec.source.endswith(EXPORTED_SUFFIX):
        return None
    places = [weights_path] if weights_path is not None else []
    if code_dir is not None and (code_dir / spec.source).resolve().is_relative_to(code_dir.resolve()):
        places.append(code_dir / spec.source)
    return next((place for place in places if (place / CONFIG_FILE).is_file()), None)


def _is_user_module(module: ModuleType) -> bool:
    return bool(module.__dict__.get("__hive_user__"))
