"""State from those that have it to those that need it, box by box, over the group.

Every rank says which boxes of which tensors it has and which it needs; all compute the same list of transfers and walk
it in the same order, so no two ranks wait for each other. Memory: what a rank needs, one piece on its way, and one
tensor of the files it reads from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from protos.errors import HiveError, SpecError
from strategies.checkpoint_torch import TrainingState, extent_lists
from strategies.engine_torch import Engine
from strategies.extent import Extent
from strategies.group_torch import Group
from strategies.mapped_pages import let_go

MODEL, OPTIMIZER = "model", "optimizer"
PIECE_BYTES = 64 * 1024 * 1024
Key = tuple[str, str]  # MODEL or OPTIMIZER, and the tensor's name


@dataclass(frozen=True, slots=True)
class Held:
    """A box of a tensor that some rank has."""

    dtype: str
    extent: Extent


Having = Mapping[Key, Sequence[Held]]


@dataclass(frozen=True, slots=True)
class Transfer:
    key: Key
    source: int
    target: int
    box: Extent


def plan_transfers(
    having: Sequence[Having], needs: Sequence[Mapping[Key, Extent]], *, own_first: bool = True
) -> list[Transfer]:
    """In the order in which every rank performs them; `source` == `target` is a copy on that rank.

    A box that one rank has whole comes from it: the needing rank itself (`own_first`), else the lowest; otherwise it is
    put together from the parts of all. Raises HiveError when some element of what is needed is nowhere.
    """
    transfers: list[Transfer] = []
    for key in sorted(set(chain.from_iterable(needs))):
        holders = [(rank, held) for rank, found in enumerate(having) for held in found.get(key, ())]
        for target, wanted in enumerate(needs):
            if key in wanted:
                transfers += _sources(key, target, wanted[key], holders, own_first)
    return transfers


def _sources(
    key: Key, target: int, need: Extent, holders: Sequence[tuple[int, Held]], own_first: bool
) -> list[Transfer]:
    if not need.elements:
        return []
    ordered = sorted(holders, key=lambda each: (own_first and each[0] != target, each[0]))
    for rank, held in ordered:
        if held.extent.overlap(need) == need:
            return [Transfer(key, rank, target, need)]
    parts: dict[Extent, Transfer] = {}
    for rank, held in ordered:
        box = held.extent.overlap(need)
        if box is not None and not any(box.overlap(known) for known in parts):
            parts[box] = Transfer(key, rank, target, box)
    if sum(box.elements for box in parts) != need.elements:
        raise HiveError(
            f"no ranks together have the whole of {key[1]}: {list(need.size)} of {list(need.shape)} are needed",
            "the checkpoint is incomplete: remove it from the nodes' disks, or submit the job again",
        )
    return list(parts.values())


def collect(group: Group, states: Sequence[TrainingState], engine: Engine) -> TrainingState:
    """What this rank's engine needs of the state that the ranks have together; `states`: what lies on this rank's disk,
    as checkpoint_torch.load maps it."""
    documents = [_parsed(content) for content in group.gather_bytes(_described(states, _holdings(states)))]
    known = {key: held[0] for document in documents for key, held in document.having.items()}
    aliases = dict(chain.from_iterable(document.aliases.items() for document in documents))
    scalars = dict(chain.from_iterable(document.scalars.items() for document in documents))
    needs = _needs(engine, {key: held.extent.shape for key, held in known.items()}, aliases)
    if missing := [name for kind, name in needs if (kind, name) not in known]:
        raise SpecError(
            f"the checkpoint has no {', '.join(missing[:4])}", "the job's code changed: submit it as a new job"
        )
    everyone = [_parse_needs(content) for content in group.gather_bytes(_describe_needs(needs))]
    targets = {key: empty(known[key].dtype, list(extent.size)) for key, extent in needs.items()}
    transfers = plan_transfers([document.having for document in documents], everyone)
    perform(group, transfers, needs, targets, _Files(states))
    head = next(document for document in documents if document.step)
    own = {name for kind, name in needs if kind == MODEL}
    return TrainingState(
        head.step,
        head.samples,
        head.epoch,
        {name: tensor for (kind, name), tensor in targets.items() if kind == MODEL},
        {alias: name for alias, name in aliases.items() if name in own},
        {name: tensor for (kind, name), tensor in targets.items() if kind == OPTIMIZER},
        {name: value for name, value in scalars.items() if name.rpartition("/")[0] in own},
        {name: extent for (_, name), extent in needs.items() if not extent.is_whole},
    )


def agree_on_start(group: Group, engine: Engine) -> None:
    """Of tensors that several ranks hold, all take the lowest rank's initial values."""
    state = engine.state()
    everyone = gather_holdings(group, state, engine.extents())
    wanted = [{key: held[0].extent for key, held in having.items()} for having in everyone]
    needs, targets = wanted[group.rank], {(MODEL, name): tensor for name, tensor in state.items()}
    with torch.no_grad():
        transfers = plan_transfers(everyone, wanted, own_first=False)
        perform(group, transfers, needs, targets, lambda key, box: targets[key][box.inside(needs[key])])


def gather_holdings(group: Group, state: Mapping[str, Tensor], extents: Mapping[str, Extent]) -> list[Having]:
    """What every rank's engine has of the model, in the order of the ranks."""
    having = {
        (MODEL, name): [Held(_dtype(tensor), extents.get(name, Extent.whole(tensor.shape)))]
        for name, tensor in state.items()
    }
    return [_parsed(content).having for content in group.gather_bytes(_described((), having))]


def perform(
    group: Group,
    transfers: Sequence[Transfer],
    needs: Mapping[Key, Extent],
    targets: Mapping[Key, Tensor],
    read: Callable[[Key, Extent], Tensor],
) -> None:
    """`read(key, box)` gives what this rank has; what it needs is written into `targets`."""
    for transfer in transfers:
        key, box = transfer.key, transfer.box
        if group.rank == transfer.source == transfer.target:
            own, source = targets[key][box.inside(needs[key])], read(key, box)
            if own.data_ptr() != source.data_ptr():
                own.copy_(source)
        elif group.rank == transfer.source:
            for piece in pieces(read(key, box)):
                group.send(as_bytes(piece).to(group.device), transfer.target)
        elif group.rank == transfer.target:
            for piece in pieces(targets[key][box.inside(needs[key])]):
                arriving = torch.empty(piece.numel() * piece.element_size(), dtype=torch.uint8, device=group.device)
                group.receive(arriving, transfer.source)
                piece.copy_(arriving.view(piece.dtype).view(piece.shape))


class _Files:
    """Boxes of what lies in files. Of two tensors read one after the other the first is let go of: with all that was
    read, a rank would hold its state twice."""

    def __init__(self, states: Sequence[TrainingState]) -> None:
        self._states = states
        self._last: Tensor | None = None

    def __call__(self, key: Key, box: Extent) -> Tensor:
        kind, name = key
        for state in self._states:
            tensor = (state.model if kind == MODEL else state.optimizer).get(name)
            if tensor is not None and (extent := _extent(state, name, tensor)).overlap(box) == box:
                if self._last is not None and self._last is not tensor:
                    let_go(self._last.data_ptr(), self._last.numel() * self._last.element_size())
                self._last = tensor
                return tensor[box.inside(extent)]
        raise HiveError(f"{name} is not here although it was said to be", "see the node's log")


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views along the first dimension, each of about PIECE_BYTES."""
    if tensor.dim() == 0:
        yield tensor
        return
    rows = max(1, PIECE_BYTES // max(prod(tensor.shape[1:]) * tensor.element_size(), 1))
    yield from torch.split(tensor, rows)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def empty(dtype: str, shape: list[int]) -> Tensor:
    """Raises SpecError for a name that is no type of torch."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise SpecError(f"a peer sent a tensor of unknown type {dtype!r}", "do all nodes run the same version?")
    return torch.empty(shape, dtype=kind)


# ---- what ranks say to each other


@dataclass(frozen=True, slots=True)
class _Document:
    """`step` 0: this rank has nothing."""

    step: int
    samples: int
    epoch: int
    having: Having
    aliases: Mapping[str, str]
    scalars: Mapping[str, Any]


def _holdings(states: Sequence[TrainingState]) -> dict[Key, list[Held]]:
    having: dict[Key, list[Held]] = {}
    for state in states:
        for kind, tensors in ((MODEL, state.model), (OPTIMIZER, state.optimizer)):
            for name, tensor in tensors.items():
                having.setdefault((kind, name), []).append(Held(_dtype(tensor), _extent(state, name, tensor)))
    return having


def _extent(state: TrainingState, name: str, tensor: Tensor) -> Extent:
    return state.extents.get(name, Extent.whole(tensor.shape))


def _needs(engine: Engine, shapes: Mapping[Key, tuple[int, ...]], aliases: Mapping[str, str]) -> dict[Key, Extent]:
    """The boxes of the model's tensors that the engine holds, and of the optimizer's state for each of them."""
    extents = engine.extents()
    needs: dict[Key, Extent] = {}
    for name, tensor in engine.state().items():
        needs[MODEL, aliases.get(name, name)] = extents.get(name, Extent.whole(tensor.shape))
    for kind, name in shapes:
        owner = (MODEL, name.rpartition("/")[0])
        if kind == OPTIMIZER and owner in needs:
            box, shape = needs[owner], shapes[kind, name]
            needs[kind, name] = box if box.shape == shape else Extent.whole(shape)
    return needs


def _described(states: Sequence[TrainingState], having: Having) -> bytes:
    first = states[0] if states else None
    return json.dumps(
        {
            "at": [first.step, first.samples, first.epoch] if first is not None else [0, 0, 0],
            "having": [
                [*key, [[held.dtype, *extent_lists(held.extent)] for held in helds]] for key, helds in having.items()
            ],
            "aliases": dict(chain.from_iterable(state.aliases.items() for state in states)),
            "scalars": dict(chain.from_iterable(state.scalars.items() for state in states)),
        }
    ).encode()


def _parsed(content: bytes) -> _Document:
    document = json.loads(content)
    having = {
        (kind, name): [Held(dtype, Extent(*map(tuple, lists))) for dtype, *lists in helds]
        for kind, name, helds in document["having"]
    }
    step, samples, epoch = document["at"]
    return _Document(step, samples, epoch, having, document["aliases"], document["scalars"])


def _describe_needs(needs: Mapping[Key, Extent]) -> bytes:
    return json.dumps([[*key, *extent_lists(extent)] for key, extent in needs.items()]).encode()


def _parse_needs(content: bytes) -> dict[Key, Extent]:
    return {(kind, name): Extent(*map(tuple, lists)) for kind, name, *lists in json.loads(content)}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
