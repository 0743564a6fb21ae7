"""Jobs of the contract of the strategies, and the same training written by hand in plain torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_harness import Job
from torch import Tensor
from torch.nn import functional

from strategies.data.dataset import epoch_order
from strategies.data.opening import open_splits
from strategies.model_torch import build

MODELS = ("mlp", "cnn", "gpt", "lstm")
ROWS = 100
BATCH = 24  # the last batch of an epoch has four rows
STEPS = 20
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "adamw", "lr": 0.02, "weight_decay": 0.1},
    "cnn": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "gpt": {"name": "adamw", "lr": 0.003},
    "lstm": {"name": "adam", "lr": 0.01},
}
SHAPES = {"mlp": (8,), "cnn": (1, 8, 8), "lstm": (6, 3)}

Pieces = Callable[[int], Sequence[Sequence[tuple[int, int]]]]
"""Of so many rows, for every replica: from where to where each of its micro-batches goes."""


def job_of(folder: Path, model: str) -> Job:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(5)
    if model == "gpt":
        tokens = (np.cumsum(generator.integers(0, 3, size=(ROWS, 13)), axis=1) % 32).astype(np.int64)
        x, y = tokens[:, :-1], tokens[:, 1:].copy()
        y[generator.random(y.shape) < 0.2] = -100  # ranks and micro-batches count different numbers of tokens
    else:
        x = generator.normal(size=(ROWS, *SHAPES[model])).astype(np.float32)
        y = x.reshape(ROWS, -1)[:, :4].argmax(1)
    np.savez(folder / "train.npz", x=x, y=y)
    document = {
        "model": {"source": f"model.py:{model}"},
        "data": {"source": "train.npz", "features": "x", "target": "y"},
        "train": {
            "loss": "causal_lm" if model == "gpt" else "cross_entropy",
            "batch_size": BATCH,
            "steps": STEPS,
            "optimizer": OPTIMIZERS[model],
            "seed": 2,
        },
        "checkpoint": {"every_s": 0.01},
    }
    job = Job(folder, document, {}, folder / "train.npz")
    shutil.copy(Path(__file__).with_name("strategy_models.py"), folder / "code" / "model.py")
    return job


def whole(rows: int) -> list[list[tuple[int, int]]]:
    return [[(0, rows)]]


def by_hand(job: Job, pieces: Pieces) -> tuple[list[float], dict[str, Tensor]]:
    """(loss of each step, final weights) in one process, with the batch norm statistics of a strategy: each micro-batch
    is normalised by itself, one after the other on each replica; after a step the replicas' running statistics are
    averaged by their share of the loss. `pieces` = `whole` is training as everyone writes it."""
    train = job.spec.train
    torch.set_num_threads(1)
    model = build(job.spec.model, job.folder / "code", None, train.seed)
    made: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    options = train.optimizer.model_extra or {}
    optimizer = made[train.optimizer.name](model.parameters(), lr=train.optimizer.lr, **options)
    data = open_splits(job.spec.data, job.data, job.folder / "code", loss=train.loss).train
    losses = []
    for step in range(STEPS):
        epoch, position = divmod(step, -(-ROWS // BATCH))
        batch = data.batch(epoch_order(data, train.seed, epoch, train.shuffle).batch(position, BATCH))
        features, target = torch.from_numpy(batch.features), torch.from_numpy(batch.target)
        items = int((target != -100).sum())
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        after = {name: torch.zeros_like(buffer, dtype=torch.float64) for name, buffer in before.items()}
        optimizer.zero_grad()
        total = 0.0
        for replica in pieces(len(target)):
            model.load_state_dict(before, strict=False)
            for start, stop in replica:
                output, aim = model(features[start:stop]).flatten(0, -2), target[start:stop].flatten()
                loss = functional.cross_entropy(output, aim, reduction="sum") / items
                loss.backward()
                total += loss.item()
            share = sum(int((target[start:stop] != -100).sum()) for start, stop in replica) / items
            for name, buffer in model.named_buffers():
                after[name] += buffer * share
        model.load_state_dict({name: value.to(before[name].dtype) for name, value in after.items()}, strict=False)
        optimizer.step()
        losses.append(total)
    return losses, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
