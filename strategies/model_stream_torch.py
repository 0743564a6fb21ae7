"""The trained model as one safetensors file, when every tensor is whole on some rank: written by rank 0 as they arrive.

No rank ever holds the whole model. Every name of the state dict is written, tied ones too, so that plain
load_state_dict takes the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from strategies.group_torch import Group
from strategies.state_transfer_torch import as_bytes, empty, pieces
from strategies.tensor_file_torch import Entry, written


def stream_model(path: Path, group: Group, own: Mapping[str, Tensor]) -> bool:
    """`own`: whole tensors that this rank has, tied ones under each name; of those that several have the lowest rank's
    is taken. True on rank 0, which writes. Raises PeerLost, and OSError of the disk."""
    said = [json.loads(content) for content in group.gather_bytes(_described(own))]
    source: dict[str, int] = {}
    entries: dict[str, Entry] = {}
    for rank, described in enumerate(said):
        for name, (dtype, shape) in described.items():
            source.setdefault(name, rank)
            entries.setdefault(name, Entry(empty(dtype, [0]).dtype, tuple(shape)))
    names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))  # keeps every tensor aligned
    if group.rank:
        for name in names:
            if source[name] == group.rank:
                for piece in pieces(own[name]):
                    group.send(as_bytes(piece).to(group.device), 0)
        return False
    with written(path, {name: entries[name] for name in names}) as put:
        for name in names:
            if source[name] == 0:
                put(own[name])
                continue
            shape = torch.empty(entries[name].shape, dtype=entries[name].dtype, device="meta")
            for piece in pieces(shape):
                arriving = torch.empty(piece.nbytes, dtype=torch.uint8, device=group.device)
                group.receive(arriving, source[name])
                put(arriving)
    return True


def _described(own: Mapping[str, Tensor]) -> bytes:
    return json.dumps(
        {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in own.items()}
    ).encode()
