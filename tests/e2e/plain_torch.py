"""A job of jobs/ written by hand in plain torch, in this process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from protos.jobspec import JobSpec
from strategies.data.dataset import epoch_order
from strategies.data.opening import open_splits
from strategies.sample_order import steps

JOBS = Path(__file__).parent / "jobs"
OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def models() -> ModuleType:
    specification = importlib.util.spec_from_file_location("e2e_models", JOBS / "model.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def plain_torch(spec: JobSpec) -> tuple[list[float], dict[str, Tensor], list[int]]:
    """The loss of each step, the final weights, the rows of each batch."""
    torch.set_num_threads(1)
    data = open_splits(spec.data, None, None, loss=spec.train.loss).train
    torch.manual_seed(spec.train.seed)
    model = getattr(models(), spec.model.source.partition(":")[2])(**spec.model.args)
    options = spec.train.optimizer.model_dump(exclude={"name"})
    optimizer = OPTIMIZERS[spec.train.optimizer.name](model.parameters(), **options)
    per_epoch = steps(data.rows, spec.train.batch_size)
    losses, rows = [], []
    for step in range(spec.train.steps or 0):
        epoch, position = divmod(step, per_epoch)
        order = epoch_order(data, spec.train.seed, epoch, spec.train.shuffle)
        batch = data.batch(order.batch(position, spec.train.batch_size))
        features, target = torch.from_numpy(np.ascontiguousarray(batch.features)), torch.from_numpy(batch.target)
        loss = functional.cross_entropy(model(features).flatten(0, -2), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        rows.append(len(features))
    return losses, model.state_dict(), rows
