"""A real transformer with its real weights: identified, fine-tuned as plain transformers would, and cut in two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import Job, metrics_of
from minilm import PARAMETERS, linked, minilm_folder
from split_chain import Chain
from torch.nn import functional

from protos.jobspec import ModelSpec, parse
from protos.states import AttemptState
from strategies import model_torch
from strategies.data import Batch
from strategies.data.dataset import epoch_order
from strategies.data.opening import open_splits
from strategies.profile_torch import run
from strategies.split_torch import trace_job

transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'hive[hf]'")
pytestmark = pytest.mark.slow

NAMES = ["input_ids", "attention_mask", "token_type_ids"]
CLASSIFIER = {
    "task": "sequence_classification",
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
STEPS, BATCH, LENGTH = 20, 8, 12


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("minilm")
    random = np.random.default_rng(0)
    ids = random.integers(1_000, 20_000, (96, LENGTH))
    mask = (np.arange(LENGTH) < random.integers(4, LENGTH + 1, 96)[:, None]).astype(np.int64)
    types = np.zeros_like(ids)
    np.savez(folder / "t.npz", input_ids=ids * mask, attention_mask=mask, token_type_ids=types, y=ids[:, 1] % 3)
    document = {
        "model": {"source": "minilm", "args": CLASSIFIER},
        "data": {"source": "t.npz", "features": NAMES, "target": "y"},
        "train": {"batch_size": BATCH, "steps": STEPS, "optimizer": {"name": "adamw", "lr": 5e-5}},
        "strategy": "pipeline_parallel",
    }
    linked(minilm_folder(), folder / "code" / "minilm")
    return Job(folder, document, {}, folder / "t.npz")


def features(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(1_000, 1_000 + rows * LENGTH).reshape(rows, LENGTH)
    mask = (torch.arange(LENGTH) < 9).long().repeat(rows, 1)
    return dict(zip(NAMES, (ids, mask, torch.zeros_like(ids)), strict=True))


def test_its_parameters_are_counted_from_the_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((minilm_folder() / "config.json").read_bytes())
    data = {"source": "t.npz", "features": NAMES, "target": "y"}
    spec = parse({"model": {"source": "minilm"}, "data": data, "train": {"loss": "mse"}, "strategy": "single_node"})
    given = {name: value.numpy() for name, value in features(4).items()}
    built = run(spec, None, Batch(given, np.zeros((4, LENGTH, 384), np.float32)), tmp_path)
    assert sum(parameter.numel() for parameter in built.model.parameters()) == PARAMETERS
    assert {layer.name: layer.parameters for layer in built.layers}["embeddings.word_embeddings"] == 30_522 * 384


def test_fine_tuning_has_the_loss_curve_of_plain_transformers(job: Job) -> None:
    outcome, channel = job.run_here()
    assert outcome.state is AttemptState.DONE, outcome.fault
    found = [metric["loss"] for metric in metrics_of(channel.records)]
    np.testing.assert_allclose(found, plain(job), atol=1e-4, rtol=0)
    assert len(found) == STEPS and found[-1] < found[0]


def plain(job: Job) -> list[float]:
    """from_pretrained, AdamW and a loop; only the new head and the order of samples are hive's."""
    directory = job.folder / "code" / "minilm"
    settings = {key: value for key, value in CLASSIFIER.items() if key != "task"}
    model = transformers.BertForSequenceClassification.from_pretrained(directory, **settings).train()
    fresh = model_torch.build_unloaded(ModelSpec(source="minilm", args=CLASSIFIER), job.folder / "code", None, 0)
    model.classifier.load_state_dict(fresh.classifier.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    rows = open_splits(job.spec.data, job.data, None, loss="cross_entropy").train
    losses = []
    for step in range(STEPS):
        epoch, position = divmod(step, rows.rows // BATCH)
        batch = rows.batch(epoch_order(rows, 0, epoch, True).batch(position, BATCH))
        assert isinstance(batch.features, dict) and batch.target is not None
        given = {name: torch.from_numpy(value) for name, value in batch.features.items()}
        loss = functional.cross_entropy(model(**given).logits, torch.from_numpy(batch.target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_two_stages_compute_what_the_whole_model_does(job: Job) -> None:
    code = job.folder / "code"
    known = trace_job(job.spec, code, features(2))

    def build() -> torch.nn.Module:
        return model_torch.build(job.spec.model, code, None, 0)

    chain = Chain(build, features(2), ["bert.encoder.layer.2.output.LayerNorm"], known)
    held = [sum(p.numel() for p in module.parameters()) for module in chain.modules]
    assert sum(held) == PARAMETERS + 384 * 3 + 3 and min(held) > 5_000_000
    chain.check(features(5))
