"""Checkpoints on a node's disk: folders with model.safetensors, optimizer.safetensors and state.json.

Owns the format, which is that of the whole model's tensors by name whatever decomposition wrote it: a rank that holds a
part of the model writes a part, which says of each cut tensor which box it is (strategies/checkpoint_name.py has the
names of the folders). A folder under its final name is complete: files are written beside it, fsynced and renamed, so a
crash or a full disk leaves the older ones intact. Each file's blake3 digest is checked before it is used; a torn or
corrupt folder is skipped with the reason. Tensors that share storage (tied weights) are stored once and named in
state.json. Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from protos.artifact import digest_bytes, digest_file
from protos.errors import HiveError, SpecError
from protos.jobspec import JobSpec
from strategies.checkpoint_name import CheckpointName, parse_folder, parse_part
from strategies.extent import Extent
from strategies.model_torch import address
from strategies.optimizer_torch import named_trainable

FORMAT = "hive/checkpoint/2"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Everything a run needs to go on as if nothing had happened.

    `optimizer` names tensors "parameter name/state name"; `scalars` holds the optimizer's plain numbers likewise;
    `aliases` maps a tied name to the name its tensor is stored under. `extents` says of tensors in `model` and
    `optimizer` that are cut which box they are. `part` of `parts`: what other ranks of `fence` hold makes it whole.
    """

    step: int
    samples: int
    epoch: int
    model: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    optimizer: Mapping[str, Tensor]
    scalars: Mapping[str, float | int | bool | None]
    extents: Mapping[str, Extent] = field(default_factory=dict)
    fence: int = 0
    part: int = 0
    parts: int = 1

    @property
    def name(self) -> CheckpointName:
        return CheckpointName(self.step, self.fence if self.parts > 1 else 0, self.part, self.parts)


@dataclass(frozen=True, slots=True)
class Stored:
    """A usable checkpoint, whole or a part, and where it lies."""

    name: CheckpointName
    folder: Path


@dataclass(frozen=True, slots=True)
class Found:
    """The newest usable whole checkpoint of a folder, and why newer ones were not."""

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
    final = root / state.name.folder
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
            "part": [state.fence, state.part, state.parts],
            "extents": {name: [*extent_lists(extent)] for name, extent in state.extents.items()},
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
    found = list(_folders(root))  # once: what another rank puts there meanwhile is not judged by the steps before it
    kept = sorted({name.step for name, _ in found}, reverse=True)[:keep]
    for name, old in found:
        if name.step not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return final


def extent_lists(extent: Extent) -> tuple[list[int], list[int], list[int]]:
    """As it stands in state.json: shape, start and size."""
    return list(extent.shape), list(extent.start), list(extent.size)


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
    """The newest whole checkpoint of this spec whose digests hold."""
    found, skipped = stored(root, digest)
    whole = next((each for each in found if each.name.whole), None)
    return Found(whole.folder if whole else None, whole.name.step if whole else 0, skipped)


def stored(root: Path, digest: str) -> tuple[tuple[Stored, ...], tuple[str, ...]]:
    """Usable checkpoints and parts below `root`, newest first, down to the first whole one; and why others are not."""
    found: list[Stored] = []
    skipped: list[str] = []
    for name, folder in _folders(root):
        inner = [(parse_part(path.name, name.step), path) for path in sorted(folder.iterdir())] if name.whole else []
        parts = [(part, path) for part, path in inner if part is not None]
        for each, path in parts or [(name, folder)]:
            if problem := problem_with(path, digest, each.step):
                skipped.append(f"{path.relative_to(root)}: {problem}")
            else:
                found.append(Stored(each, path))
        here = [each.name for each in found if each.folder == folder or each.folder.parent == folder]
        if name.whole and here and len(here) == here[0].parts:
            break  # complete: nothing older is of any use
    return tuple(found), tuple(skipped)


def problem_with(folder: Path, digest: str, step: int | None = None) -> str:
    """Why a checkpoint cannot be used; empty when it can. `step`: what it must be of, else its folder's name says."""
    if step is None:
        named = parse_folder(folder.name)
        step = named.step if named is not None else -1
    try:
        document = json.loads((folder / STATE_FILE).read_text())
        if document["format"] != FORMAT:
            return f"format {document['format']!r} is not {FORMAT!r}"
        if document["spec"] != digest:
            return "it belongs to a job with another model, data or training section"
        if document["step"] != step:
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
    """A checkpoint that `newest` or `stored` found. Tensors are mapped from the file: read when they are used."""
    document = json.loads((folder / STATE_FILE).read_text())
    fence, part, parts = document["part"]
    return TrainingState(
        document["step"],
        document["samples"],
        document["epoch"],
        safetensors.torch.load_file(folder / MODEL_FILE),
        document["aliases"],
        safetensors.torch.load_file(folder / OPTIMIZER_FILE),
        document["scalars"],
        {name: Extent(*map(tuple, lists)) for name, lists in document["extents"].items()},
        fence,
        part,
        parts,
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


def _folders(root: Path) -> list[tuple[CheckpointName, Path]]:
    """Newest first."""
    if not root.is_dir():
        return []
    named = [(parse_folder(path.name), path) for path in root.iterdir() if path.is_dir()]
    return sorted(((name, path) for name, path in named if name is not None), key=lambda each: each[0], reverse=True)
