"""Small jobs for the tests of the training engine, and the same training written by hand in plain torch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_harness import Job
from torch.nn import functional

from strategies.data.dataset import epoch_order
from strategies.data.opening import open_splits
from strategies.model_torch import build
from strategies.optimizer_torch import learning_rate

MLP = """import torch


class Net(torch.nn.Module):
    def __init__(self, inputs, hidden, classes, dropout, norm):
        super().__init__()
        self.first = torch.nn.Linear(inputs, hidden)
        self.norm = torch.nn.BatchNorm1d(hidden) if norm else torch.nn.Identity()
        self.dropout = torch.nn.Dropout(dropout)
        self.second = torch.nn.Linear(hidden, classes)
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.second(self.dropout(torch.relu(self.norm(self.first(x)))))


def build(inputs=8, hidden=16, classes=4, dropout=0.0, norm=False):
    return Net(inputs, hidden, classes, dropout, norm)
"""

GPT = """import torch
from torch.nn import functional


class Block(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = torch.nn.LayerNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width, bias=False)
        self.out = torch.nn.Linear(width, width)
        self.norm2 = torch.nn.LayerNorm(width)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 2 * width), torch.nn.GELU(), torch.nn.Linear(2 * width, width)
        )

    def forward(self, x):
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.mlp(self.norm2(x))


class Gpt(torch.nn.Module):
    def __init__(self, vocabulary, width, length):
        super().__init__()
        self.tokens = torch.nn.Embedding(vocabulary, width)
        self.places = torch.nn.Embedding(length, width)
        self.blocks = torch.nn.ModuleList(Block(width, 2) for _ in range(2))
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(vocabulary=32, width=16, length=12):
    return Gpt(vocabulary, width, length)
"""


def mlp_job(
    folder: Path,
    *,
    rows: int = 300,
    test_rows: int = 0,
    loss: str = "cross_entropy",
    classes: int = 4,
    dropout: float = 0.0,
    norm: bool = False,
    code: dict[str, str] | None = None,
    checkpoint: dict[str, Any] | None = None,
    **train: Any,
) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(7)
    data: dict[str, Any] = {"source": "train.npz", "features": "x", "target": "y"}
    for name, count in (("train", rows), ("test", test_rows)):
        x = generator.normal(size=(count, 8)).astype(np.float32)
        scores = x[:, :4] + 0.3 * generator.normal(size=(count, 4))
        y = scores.argmax(1) if classes > 1 else (scores[:, :1] > 0).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, y=y)
    if test_rows:
        data["test"] = "test.npz"
    document = {
        "model": {"source": "model.py:build", "args": {"classes": classes, "dropout": dropout, "norm": norm}},
        "data": data,
        "train": {
            "loss": loss,
            "batch_size": 32,
            "clip_norm": 0.5,
            "optimizer": {"name": "adamw", "lr": 0.02, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "warmup_steps": 5},
            **train,
        },
        "checkpoint": checkpoint or {},
    }
    test = folder / "test.npz" if test_rows else None
    return Job(folder, document, code or {"model.py": MLP}, folder / "train.npz", test)


def gpt_job(folder: Path, **train: Any) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(3)
    tokens = (np.cumsum(generator.integers(0, 3, size=(120, 13)), axis=1) % 32).astype(np.int64)
    labels = tokens[:, 1:].copy()
    labels[generator.random(labels.shape) < 0.2] = -100  # ranks and micro-batches count different numbers of tokens
    np.savez(folder / "train.npz", x=tokens[:, :-1], y=labels)
    document = {
        "model": {"source": "model.py:build"},
        "data": {"source": "train.npz", "features": "x", "target": "y"},
        "train": {
            "loss": "causal_lm",
            "batch_size": 24,
            "clip_norm": 1.0,
            "optimizer": {"name": "adamw", "lr": 0.003},
            "schedule": {"name": "linear", "warmup_steps": 3},
            **train,
        },
    }
    return Job(folder, document, {"model.py": GPT}, folder / "train.npz")


def plain_torch(job: Job) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(loss of each step, final weights) of one process that sees every whole batch."""
    spec = job.spec
    train = spec.train
    torch.manual_seed(train.seed)
    model = build(spec.model, job.folder / "code", None, train.seed)
    options = dict(train.optimizer.model_extra or {})
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.optimizer.lr, **options)
    splits = open_splits(spec.data, job.data, job.folder / "code", test_path=job.test, loss=train.loss)
    per_epoch = -(-splits.train.rows // train.batch_size)
    total = train.steps or (train.epochs or 1) * per_epoch
    losses = []
    for step in range(total):
        epoch, position = divmod(step, per_epoch)
        order = epoch_order(splits.train, train.seed, epoch, train.shuffle)
        batch = splits.train.batch(order.batch(position, train.batch_size))
        assert not isinstance(batch.features, dict) and batch.target is not None
        output, target = model(torch.from_numpy(batch.features)), torch.from_numpy(batch.target)
        loss = _loss(train.loss, output, target)
        optimizer.zero_grad()
        loss.backward()
        if train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train.schedule, train.optimizer.lr, step, total)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _loss(name: str, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    match name:
        case "mse":
            return functional.mse_loss(output, target)
        case "l1":
            return functional.l1_loss(output, target)
        case "bce_with_logits":
            return functional.binary_cross_entropy_with_logits(output, target)
        case "causal_lm":
            return functional.cross_entropy(output.flatten(0, 1), target.flatten())
    return functional.cross_entropy(output, target)


with contextlib.suppress(RuntimeError):
    torch.set_num_threads(1)
