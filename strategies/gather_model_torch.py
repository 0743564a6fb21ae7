"""The trained model as one safetensors file when tensors are cut over the ranks: gathered and written one by one.

Rank 0 holds at most one tensor. Every name of the state dict is written, tied ones too, so that plain load_state_dict
takes the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from strategies.group_torch import Group
from strategies.held_parts_torch import Part, chunk_of
from strategies.tensor_file_torch import Entry, written


def write_parts(path: Path, group: Group, parts: Mapping[str, Part], aliases: Mapping[str, str]) -> bool:
    """Every rank calls it with the same names; True on rank 0, which writes. Raises PeerLost, and OSError."""
    source = {name: parts[aliases.get(name, name)] for name in (*parts, *aliases)}
    ordered = sorted(source, key=lambda name: (-source[name].local.element_size(), name))  # keeps each one aligned
    if group.rank:
        for name in ordered:
            part = source[name]
            if part.dimension is not None and part.extent.elements:
                group.send(part.local.detach().contiguous().to(group.device), 0)
        return False
    with written(path, {name: Entry(source[name].local.dtype, source[name].extent.shape) for name in ordered}) as put:
        for name in ordered:
            _put(put, group, source[name])
    return True


def _put(put: Callable[[Tensor], None], group: Group, part: Part) -> None:
    own = part.local.detach()
    if part.dimension is None:
        put(own)
        return
    pieces: list[Tensor] = []
    for rank in range(group.world_size):
        piece = own if rank == 0 else _received(group, part, part.dimension, rank)
        if part.dimension == 0:
            put(piece)  # the parts lie one after the other
        else:
            pieces.append(piece.cpu())
    if pieces:
        put(torch.cat(pieces, part.dimension))


def _received(group: Group, part: Part, dimension: int, rank: int) -> Tensor:
    extent = chunk_of(part.extent.shape, dimension, rank, group.world_size)
    piece = torch.empty(extent.size, dtype=part.local.dtype, device=group.device)
    if extent.elements:
        group.receive(piece, rank)
    return piece
