"""Checkpoints on a node's disk: `step-00001234/` with model.safetensors, optimizer.safetensors and state.json.

Owns the format. A folder under its final name is complete: files are written beside it, fsynced and renamed, so a crash
or a full disk leaves the older ones intact. Each file's blake3 digest is checked before it is used; a torn or corrupt
folder is skipped with the reason. Tensors that share storage (tied weights) are stored once and named in state.json.
Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from protos.artifact import digest_bytes, digest_file
from protos.errors import HiveError, SpecError
from protos.jobspec import JobSpec
from strategies.model_torch import address
from strategies.optimizer_torch import named_trainable

FORMAT = "hive/checkpoint/1"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_FOLDER = re.compile(r"^step-(\d{8,})$")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Everything a run needs to go on as if nothing had happened.

    `optimizer` names tensors "parameter name/state name"; `scalars` holds the optimizer's plain numbers likewise;
    `aliases` maps a tied name to the name its tensor is stored under.
    """

    step: int
    samples: int
    epoch: int
    model: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    optimizer: Mapping[str, Tensor]
    scalars: Mapping[str, float | int | bool | None]


@dataclass(frozen=True, slots=True)
class Found:
    """The newest usable checkpoint of a folder, and why newer ones were not."""

    folder: Path | None
    step: int
    skipped: tuple[str, ...]


def spec_digest(spec: JobSpec) -> str:
    """Of what decides the state of a run at a step: model, data and training; not of where or how it runs."""
    parts = spec.model_dump(mode="json", include={"model", "data", "train"})
    parts["train"].pop("accumulate")
    parts["train"].pop("evaluate_every")
    return str(digest_bytes(json.dumps(parts, sort_keys=True).encode()))


def capture(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, samples: int, epoch: int, copy: bool
) -> TrainingState:
    """The state as CPU tensors; `copy` when training goes on while it is written."""
    tensors, aliases = untied(model.state_dict())
    named: dict[str, Tensor] = {}
    scalars: dict[str, float | int | bool | None] = {}
    for parameter_name, parameter in named_trainable(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                named[f"{parameter_name}/{key}"] = value
            elif value is None or isinstance(value, (bool, int, float)):
                scalars[f"{parameter_name}/{key}"] = value
    held = {name: _on_cpu(tensor, copy) for name, tensor in tensors.items()}
    return TrainingState(
        step, samples, epoch, held, aliases, {name: _on_cpu(tensor, copy) for name, tensor in named.items()}, scalars
    )


def restore(state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Into a freshly built model and optimizer of the same spec. Raises SpecError when they do not fit."""
    tensors = dict(state.model)
    tensors.update({alias: tensors[name] for alias, name in state.aliases.items()})
    own = model.state_dict()
    if set(own) != set(tensors) or any(own[name].shape != tensors[name].shape for name in own):
        raise SpecError("the checkpoint is of another model", "the job's code changed: submit it as a new job")
    model.load_state_dict(tensors)
    index = {name: number for number, name in enumerate(named_trainable(model))}
    slots: dict[int, dict[str, Any]] = {}
    for source in (state.optimizer, state.scalars):
        for name, value in source.items():
            parameter_name, _, key = name.rpartition("/")
            slots.setdefault(index[parameter_name], {})[key] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each shared tensor once, and which names are aliases of which."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        first = names.setdefault(address(tensor), name)
        if first == name:
            tensors[name] = tensor
        else:
            aliases[name] = first
    return tensors, aliases


def write(root: Path, state: TrainingState, digest: str, keep: int) -> Path:
    """Commits a checkpoint below `root` and removes all but the newest `keep`. Raises OSError ENOSPC on a full disk."""
    final = root / f"step-{state.step:08d}"
    if final.exists() and not problem_with(final, digest):
        return final  # another rank of this node wrote the same step
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".tmp-{state.step}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        save_tensors(temporary / MODEL_FILE, state.model)
        save_tensors(temporary / OPTIMIZER_FILE, state.optimizer)
        document = {
            "format": FORMAT,
            "step": state.step,
            "samples": state.samples,
            "epoch": state.epoch,
            "spec": digest,
            "digests": {name: digest_file(temporary / name) for name in (MODEL_FILE, OPTIMIZER_FILE)},
            "aliases": dict(state.aliases),
            "scalars": dict(state.scalars),
        }
        with (temporary / STATE_FILE).open("w") as file:
            json.dump(document, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(temporary)
        _put_in_place(temporary, final, digest)
        sync_folder(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _folders(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _put_in_place(temporary: Path, final: Path, digest: str) -> None:
    """Other ranks of this node may do the same at this moment: one that is whole stays, one that is not makes way."""
    while True:
        try:
            temporary.rename(final)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        if not problem_with(final, digest):
            return
        broken = temporary.with_name(f"{temporary.name}-{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):  # another rank was faster
            final.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)


def newest(root: Path, digest: str) -> Found:
    """The newest checkpoint of this spec whose digests hold."""
    skipped: list[str] = []
    for folder in _folders(root):
        problem = problem_with(folder, digest)
        if not problem:
            return Found(folder, _step_of(folder), tuple(skipped))
        skipped.append(f"{folder.name}: {problem}")
    return Found(None, 0, tuple(skipped))


def problem_with(folder: Path, digest: str) -> str:
    """Why a checkpoint cannot be used; empty when it can."""
    try:
        document = json.loads((folder / STATE_FILE).read_text())
        if document["format"] != FORMAT:
            return f"format {document['format']!r} is not {FORMAT!r}"
        if document["spec"] != digest:
            return "it belongs to a job with another model, data or training section"
        if document["step"] != _step_of(folder):
            return f"state.json says step {document['step']}"
        for name in (MODEL_FILE, OPTIMIZER_FILE):
            if digest_file(folder / name) != document["digests"][name]:
                return f"{name} does not have the digest it was written with"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"state.json cannot be read: {error}"
    return ""


def samples_of(folder: Path) -> int:
    """Committed samples of a checkpoint that `newest` found."""
    return int(json.loads((folder / STATE_FILE).read_text())["samples"])


def load(folder: Path) -> TrainingState:
    """A checkpoint that `newest` found."""
    document = json.loads((folder / STATE_FILE).read_text())
    return TrainingState(
        document["step"],
        document["samples"],
        document["epoch"],
        safetensors.torch.load_file(folder / MODEL_FILE),
        document["aliases"],
        safetensors.torch.load_file(folder / OPTIMIZER_FILE),
        document["scalars"],
    )


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """safetensors, fsynced. Raises OSError with the system's number, also where the library hides it in a sentence."""
    try:
        safetensors.torch.save_file(dict(tensors), path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    except (safetensors.SafetensorError, OSError) as error:
        number = next((code for code in _FULL if f"os error {code}" in str(error)), getattr(error, "errno", None))
        if number in _FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if isinstance(error, OSError):
            raise
        raise HiveError(f"{path.name} cannot be written: {error}", "see the node's log") from error


def write_model(path: Path, model: nn.Module) -> None:
    """The result: every name of the state dict, tied ones too, so that plain load_state_dict takes it."""
    state = {name: _on_cpu(tensor, copy=False) for name, tensor in model.state_dict().items()}
    unique, aliases = untied(state)
    unique.update({alias: state[alias].clone() for alias in aliases})
    save_tensors(path, unique)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _on_cpu(tensor: Tensor, copy: bool) -> Tensor:
    """Contiguous, on the CPU, and a whole storage of its own when it is a view of a larger one."""
    held = tensor.detach()
    if held.device.type != "cpu":
        return held.cpu().contiguous()
    if copy or not held.is_contiguous() or held.untyped_storage().nbytes() != held.numel() * held.element_size():
        return held.clone(memory_format=torch.contiguous_format)
    return held


def _folders(root: Path) -> list[Path]:
    """Newest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _FOLDER.match(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    found = _FOLDER.match(folder.name)
    return int(found[1]) if found else -1
