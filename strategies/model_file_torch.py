"""The trained model as one safetensors file, from what all ranks of a group hold: boxes of tensors, or whole ones.

Written by rank 0, which holds at most one whole tensor beyond its own part. Every name of the state dict is written,
tied ones too, so that plain load_state_dict takes the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from strategies.extent import Extent
from strategies.group_torch import Group
from strategies.state_transfer_torch import MODEL, Key, empty, gather_holdings, perform, plan_transfers
from strategies.tensor_file_torch import Entry, written


def write_whole_model(
    path: Path, group: Group, state: Mapping[str, Tensor], extents: Mapping[str, Extent], aliases: Mapping[str, str]
) -> bool:
    """Every rank calls it; True on rank 0, which writes. `state` and `extents` as an Engine has them; `aliases`: other
    names under which its tensors are written too. Of what several ranks have the lowest rank's is taken.

    Raises PeerLost, HiveError when a part is nowhere, OSError of the disk, and SpecError for a type that the format
    does not have.
    """
    everyone = gather_holdings(group, state, extents)
    known = {name: held[0] for having in reversed(everyone) for (_, name), held in having.items()}
    known |= {other: known[name] for other, name in aliases.items()}
    entries = {name: Entry(empty(held.dtype, [0]).dtype, held.extent.shape) for name, held in known.items()}
    names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))  # keeps every tensor aligned

    def read(key: Key, box: Extent) -> Tensor:
        tensor = state[key[1]]
        return tensor[box.inside(extents.get(key[1], Extent.whole(tensor.shape)))]

    def collected(name: str) -> Tensor:
        """On rank 0 the whole tensor; the others send what they have of it."""
        held, entry = aliases.get(name, name), entries[name]
        target = torch.empty(entry.shape, dtype=entry.dtype, device="meta" if group.rank else "cpu")
        if held in state and held not in extents:
            target = state[held]
        need = {(MODEL, held): Extent.whole(entry.shape)}
        perform(group, plan_transfers(everyone, [need]), need, {(MODEL, held): target}, read)
        return target

    if group.rank:
        for name in names:
            collected(name)
        return False
    with written(path, {name: entries[name] for name in names}) as put:
        for name in names:
            put(collected(name))
    return True
