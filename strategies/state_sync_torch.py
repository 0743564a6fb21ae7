"""The start of every attempt: all ranks of a group leave with one state of model, optimizer and step.

Each rank offers the valid checkpoints on its disk; the highest step that they have together wins, and newcomers and
laggards receive it from those that have it. At step 0 the initial weights of the lowest rank win. Ranks also compare
what they read: different data on one rank would train a different model in silence.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from protos.artifact import digest_bytes
from protos.errors import Blame, ErrorCode, SpecError
from strategies import checkpoint_torch
from strategies.checkpoint_name import CheckpointName
from strategies.checkpoint_torch import Stored, TrainingState
from strategies.context import TaskContext
from strategies.engine_torch import Engine
from strategies.group_torch import Group
from strategies.state_transfer_torch import agree_on_start, as_bytes, collect, empty


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run goes on; `skipped` are checkpoints that could not be used, with the reasons."""

    step: int
    samples: int
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


def synchronise(group: Group, engine: Engine, checkpoint_dir: Path, digest: str) -> Start:
    """Brings what every rank holds to the highest committed step that the ranks have together.

    Whole states are broadcast; where ranks hold parts of the model, or only parts are left of the newest state, each
    takes the boxes it needs from those that have them (state_transfer_torch).
    """
    found, skipped = checkpoint_torch.stored(checkpoint_dir, digest)
    said = [json.loads(content) for content in group.gather_bytes(_inventory(found, engine))]
    chosen = newest_together([[CheckpointName(*entry) for entry in each["found"]] for each in said])
    whole = not any(each["parts"] for each in said)
    if chosen is None:
        if whole:
            _agree_on_values(group, list(engine.state().values()))
        else:
            agree_on_start(group, engine)
        return Start(0, 0, skipped)
    mine = [each for each in found if each.name in chosen.names]
    if whole and chosen.source is not None:
        state = checkpoint_torch.load(mine[0].folder) if group.rank == chosen.source else None
        state = share_state(group, state, chosen.source)
    else:
        state = collect(group, [checkpoint_torch.load(each.folder) for each in mine], engine)
    engine.restore(state)
    return Start(state.step, state.samples, skipped)


def _agree_on_values(group: Group, tensors: Sequence[Tensor]) -> None:
    """Rank 0's on every rank. Most of the time all have drawn the same ones, and a digest is all that is sent."""
    if group.world_size == 1:
        return
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(as_bytes(tensor).numpy().data)
    if len(set(group.gather_bytes(found.digest()))) > 1:
        group.broadcast_tensors(tensors, 0)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A step that the ranks have together: `names` of its folders; `source`, the lowest rank that has it whole."""

    step: int
    names: frozenset[CheckpointName]
    source: int | None


def newest_together(offers: Sequence[Sequence[CheckpointName]]) -> Chosen | None:
    """`offers`: what each rank has. The highest step of which one rank has the whole, or all parts of a fence are
    somewhere; the same answer on every rank. None when there is none."""
    sets: dict[tuple[int, int, int], set[CheckpointName]] = {}
    for name in chain.from_iterable(offers):
        sets.setdefault((name.step, name.fence, name.parts), set()).add(name)
    complete = [key for key, names in sets.items() if len(names) == key[2]]
    if not complete:
        return None
    best = max(complete, key=lambda key: (key[0], key[2] == 1, key[1], -key[2]))
    names = frozenset(sets[best])
    whole = [rank for rank, offer in enumerate(offers) if best[2] == 1 and names <= set(offer)]
    return Chosen(best[0], names, whole[0] if whole else None)


def _inventory(found: Sequence[Stored], engine: Engine) -> bytes:
    names = [[name.step, name.fence, name.part, name.parts] for name in (each.name for each in found)]
    return json.dumps({"found": names, "parts": bool(engine.holds or engine.extents())}).encode()


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
            {name: empty(*shape) for name, shape in document["model"].items()},
            document["aliases"],
            {name: empty(*shape) for name, shape in document["optimizer"].items()},
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
