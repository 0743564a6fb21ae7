"""A workload as plain torch sees it: model, tensors in memory, loss, optimizer. Shared by the peers' scripts.

Nothing of hive is imported. The peers get every advantage that costs one line: the whole data set as tensors, the fused
optimizer, no data loader, no validation, no logging.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Inputs:
    model: nn.Module
    features: Tensor
    targets: Tensor
    batch: int
    steps: int
    seed: int
    learning_rate: float

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, fused=True)


def load(path: Path) -> Inputs:
    """What bench/workloads.py wrote for a peer."""
    written: dict[str, Any] = json.loads(path.read_text())
    torch.manual_seed(written["seed"])
    specification = importlib.util.spec_from_file_location("peer_model", written["model"])
    assert specification is not None and specification.loader is not None  # a file of ours
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    model: nn.Module = getattr(module, written["function"])(**written["args"])
    features, targets = _tensors(Path(written["data"]), written["sequence"])
    numbers = written["batch"], written["steps"], written["seed"], written["learning_rate"]
    return Inputs(model, features, targets, *numbers)


def _tensors(path: Path, sequence: int) -> tuple[Tensor, Tensor]:
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    text = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    rows = (len(text) - 1) // sequence
    return text[: rows * sequence].view(rows, sequence), text[1 : rows * sequence + 1].view(rows, sequence)


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, -2), target.flatten())
