"""Jobs of the contract of the strategies, and the same training written by hand in plain torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_harness import Job
from minilm import linked, minilm_folder
from torch import Tensor, nn
from torch.nn import functional
from warm_ranks import import_once

from strategies.data import Batch
from strategies.data.dataset import epoch_order
from strategies.data.opening import open_splits
from strategies.model_torch import build

MODELS = ("mlp", "cnn", "gpt", "lstm", "minilm")
ROWS = 100
BATCH = 24  # the last batch of an epoch has four rows
STEPS = 20
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "adamw", "lr": 0.02, "weight_decay": 0.1},
    "cnn": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "gpt": {"name": "adamw", "lr": 0.003},
    "lstm": {"name": "adam", "lr": 0.01},
    # by its gradient: the bias of a key has none but rounding, which Adam would blow up to whole steps
    "minilm": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
}
CLASSIFIER = {"num_labels": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENS = 4  # of each row of minilm at most
SHAPES = {"mlp": (8,), "cnn": (1, 8, 8), "lstm": (4, 3)}

Pieces = Callable[[int], Sequence[Sequence[tuple[int, int]]]]
"""Of so many rows, for every replica: from where to where each of its micro-batches goes."""


def job_of(folder: Path, model: str) -> Job:
    """Skips the test when the weights of minilm or transformers cannot be had."""
    folder.mkdir(parents=True)
    if model == "minilm":
        return minilm_job(folder)
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
        "train": training(model, "causal_lm" if model == "gpt" else "cross_entropy"),
        "checkpoint": {"every_s": 0.01},
    }
    job = Job(folder, document, {}, folder / "train.npz")
    shutil.copy(Path(__file__).with_name("strategy_models.py"), folder / "code" / "model.py")
    return job


def training(model: str, loss: str) -> dict[str, Any]:
    return {"loss": loss, "batch_size": BATCH, "steps": STEPS, "optimizer": OPTIMIZERS[model], "seed": 2}


def minilm_job(folder: Path) -> Job:
    """all-MiniLM with its weights, fine-tuned on short texts of which most are padded."""
    pytest.importorskip("transformers", reason="needs the extra hf: pip install 'hive[hf]'")
    import_once("transformers.models.bert.modeling_bert")
    linked(minilm_folder(), folder / "code" / "minilm")
    generator = np.random.default_rng(5)
    ids = generator.integers(1_000, 20_000, (ROWS, TOKENS))
    mask = (np.arange(TOKENS) < generator.integers(2, TOKENS + 1, ROWS)[:, None]).astype(np.int64)
    rows = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    np.savez(folder / "train.npz", **rows, y=ids[:, 1] % 4)
    document = {
        "model": {"source": "minilm", "args": {"task": "sequence_classification", **CLASSIFIER}},
        "data": {"source": "train.npz", "features": list(rows), "target": "y"},
        "train": training("minilm", "cross_entropy"),
        "checkpoint": {"every_s": 1},
    }
    return Job(folder, document, {}, folder / "train.npz")


def plain_model(job: Job) -> nn.Module:
    """With its values before training: of all-MiniLM as from_pretrained gives it, only the fresh head being hive's."""
    code = job.folder / "code"
    built = build(job.spec.model, code, None, job.spec.train.seed)
    if job.spec.model.source != "minilm":
        return built
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(code / "minilm", **CLASSIFIER).train()
    model.classifier.load_state_dict(built.classifier.state_dict())
    return model


def whole(rows: int) -> list[list[tuple[int, int]]]:
    return [[(0, rows)]]


@dataclass(frozen=True)
class Reference:
    """The loss of each step, the final state, and the modules with tensors of their own, saved or not."""

    losses: list[float]
    state: dict[str, Tensor]
    modules: set[str]


def by_hand(job: Job, pieces: Pieces) -> Reference:
    """Training in one process, with the batch norm statistics of a strategy: each micro-batch
    is normalised by itself, one after the other on each replica; after a step the replicas' running statistics are
    averaged by their share of the loss. `pieces` = `whole` is training as everyone writes it."""
    train = job.spec.train
    torch.set_num_threads(1)
    model = plain_model(job)
    made: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    options = train.optimizer.model_extra or {}
    optimizer = made[train.optimizer.name](model.parameters(), lr=train.optimizer.lr, **options)
    data = open_splits(job.spec.data, job.data, job.folder / "code", loss=train.loss).train
    losses = []
    for step in range(STEPS):
        epoch, position = divmod(step, -(-ROWS // BATCH))
        batch = data.batch(epoch_order(data, train.seed, epoch, train.shuffle).batch(position, BATCH))
        given, target = features_of(batch), torch.from_numpy(batch.target)
        items = int((target != -100).sum())
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        after = {name: torch.zeros_like(buffer, dtype=torch.float64) for name, buffer in before.items()}
        optimizer.zero_grad()
        total = 0.0
        for replica in pieces(len(target)):
            model.load_state_dict(before, strict=False)
            for start, stop in replica:
                output, aim = output_of(model, given, slice(start, stop)), target[start:stop].flatten()
                loss = functional.cross_entropy(output.flatten(0, -2), aim, reduction="sum") / items
                loss.backward()
                total += loss.item()
            share = sum(int((target[start:stop] != -100).sum()) for start, stop in replica) / items
            for name, buffer in model.named_buffers():
                after[name] += buffer * share
        model.load_state_dict({name: value.to(before[name].dtype) for name, value in after.items()}, strict=False)
        optimizer.step()
        losses.append(total)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Reference(losses, state, set(modules_with_tensors(model)))


def modules_with_tensors(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            yield name


def features_of(batch: Batch) -> Tensor | dict[str, Tensor]:
    if isinstance(batch.features, dict):
        return {name: torch.from_numpy(values) for name, values in batch.features.items()}
    return torch.from_numpy(batch.features)


def output_of(model: nn.Module, given: Tensor | dict[str, Tensor], rows: slice) -> Tensor:
    if isinstance(given, dict):
        logits: Tensor = model(**{name: values[rows] for name, values in given.items()}).logits
        return logits
    output: Tensor = model(given[rows])
    return output
