"""The start of every attempt: all ranks of a group leave with the same model, optimizer and step.

Each rank offers its newest valid checkpoint; the highest step wins (lowest rank among equals) and that rank broadcasts
its state, so newcomers and laggards receive it. At step 0 rank 0's initial weights win. Ranks also compare what they
read: different data on one rank would train a different model in silence.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from protos.artifact import digest_bytes
from protos.errors import Blame, ErrorCode, SpecError
from strategies import checkpoint_torch
from strategies.checkpoint_torch import TrainingState
from strategies.context import TaskContext
from strategies.group_torch import Group

_RANKS = 1 << 16


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run goes on; `skipped` are checkpoints that could not be used, with the reasons."""

    step: int
    samples: int
    source: int
    skipped: tuple[str, ...]


def check_identified(context: TaskContext, digest: str) -> None:
    """Raises SpecError, the node's fault, when it would train on other rows than the job was identified with."""
    expected, source = context.task.data_digest, context.task.spec.data.source
    if expected is None or digest == expected:
        return
    hint = "let every node have the same files"
    if source.startswith("builtin:"):
        package = "the same Python release" if source == "builtin:stdlib" else "the same release of scikit-learn"
        hint = f"its content depends on what is installed: let every node have {package}"
    raise SpecError(
        f"{source} on {context.node_name} differs from the data the job was identified with "
        f"(digest {digest[:12]} instead of {expected[:12]}; Python {platform.python_version()} here)",
        f"{hint}, or give the data as a file; a job submitted again takes the data of the nodes that are there",
        code=ErrorCode.DATA_UNUSABLE,
        blame=Blame.NODE,
    )


def agree_on_data(group: Group, digest: str, rows: int) -> None:
    """Raises SpecError on every rank, naming the ranks that differ from rank 0."""
    own = torch.frombuffer(bytearray.fromhex(digest_bytes(f"{digest} {rows}".encode())), dtype=torch.uint8)
    all_digests = group.all_gather(own.clone().to(group.device))
    others = [rank for rank, theirs in enumerate(all_digests) if not torch.equal(theirs, all_digests[0])]
    if others:
        named = ", ".join(str(rank) for rank in others)
        raise SpecError(
            f"rank {named} reads other data than rank 0 (here: {rows} rows, digest {digest[:12]})",
            "the path holds different files on these nodes, or the data function is not deterministic",
            code=ErrorCode.DATA_UNUSABLE,
        )


def synchronise(
    group: Group, model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint_dir: Path, digest: str
) -> Start:
    """Brings model and optimizer to the highest committed step any rank holds."""
    found = checkpoint_torch.newest(checkpoint_dir, digest)
    offer = torch.tensor([found.step * _RANKS + (_RANKS - 1 - group.rank)], dtype=torch.int64, device=group.device)
    group.all_reduce(offer, dist.ReduceOp.MAX)
    step, place = divmod(int(offer.item()), _RANKS)
    source = _RANKS - 1 - place
    if step == 0:
        group.broadcast_tensors(list(model.state_dict().values()), source)
        return Start(0, 0, source, found.skipped)
    state = checkpoint_torch.load(found.folder) if group.rank == source and found.folder is not None else None
    state = share_state(group, state, source)
    checkpoint_torch.restore(state, model, optimizer)
    return Start(state.step, state.samples, source, found.skipped)


def share_state(group: Group, state: TrainingState | None, source: int) -> TrainingState:
    """The source's state on every rank: a description as JSON bytes, then the tensors."""
    if group.world_size == 1:
        assert state is not None
        return state
    described = b"" if state is None or group.rank != source else json.dumps(_description(state)).encode()
    document = json.loads(group.broadcast_bytes(described, source))
    if state is None or group.rank != source:
        state = TrainingState(
            document["step"],
            document["samples"],
            document["epoch"],
            {name: _empty(*shape) for name, shape in document["model"].items()},
            document["aliases"],
            {name: _empty(*shape) for name, shape in document["optimizer"].items()},
            document["scalars"],
        )
    group.broadcast_tensors([*state.model.values(), *state.optimizer.values()], source)
    return state


def _description(state: TrainingState) -> dict[str, object]:
    return {
        "step": state.step,
        "samples": state.samples,
        "epoch": state.epoch,
        "model": {name: _shape(tensor) for name, tensor in state.model.items()},
        "aliases": dict(state.aliases),
        "optimizer": {name: _shape(tensor) for name, tensor in state.optimizer.items()},
        "scalars": dict(state.scalars),
    }


def _shape(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _empty(dtype: str, shape: list[int]) -> Tensor:
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise SpecError(f"a peer sent a tensor of unknown type {dtype!r}", "do all nodes run the same version?")
    return torch.empty(shape, dtype=kind)
