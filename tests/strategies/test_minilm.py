"""A real transformer with its real weights, identified. That it is trained as plain transformers would, by every
strategy, is the contract's: tests/contract/test_strategies.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from minilm import PARAMETERS, minilm_folder

from protos.jobspec import parse
from strategies.data import Batch
from strategies.profile_torch import run

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'hive[hf]'")
pytestmark = pytest.mark.slow


def test_its_parameters_are_counted_from_the_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((minilm_folder() / "config.json").read_bytes())
    rows = np.arange(1_000, 1_048).reshape(4, 12)
    features = {"input_ids": rows, "attention_mask": (rows % 12 < 9).astype(np.int64), "token_type_ids": 0 * rows}
    data = {"source": "t.npz", "features": list(features), "target": "y"}
    spec = parse({"model": {"source": "minilm"}, "data": data, "train": {"loss": "mse"}, "strategy": "single_node"})
    built = run(spec, None, Batch(features, np.zeros((4, 12, 384), np.float32)), tmp_path)
    assert sum(parameter.numel() for parameter in built.model.parameters()) == PARAMETERS
    assert {layer.name: layer.parameters for layer in built.layers}["embeddings.word_embeddings"] == 30_522 * 384
