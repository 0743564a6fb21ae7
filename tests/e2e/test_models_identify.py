"""`hive models identify` with a cluster: a node builds what bytes do not tell; code that fails is its owner's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.e2e.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def made(two_nodes: Cluster) -> Cluster:
    two_nodes.heal()
    return two_nodes


def identified(made: Cluster, path: object) -> dict[str, Any]:
    done = made.hive("models", "identify", str(path), "-o", "json")
    model: dict[str, Any] = json.loads(done.stdout)["model"]
    return model


def test_a_node_counts_what_an_entry_point_builds(made: Cluster, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))\n"
    )
    model = identified(made, f"{tmp_path}/net.py:build")
    assert (model["seen_by"], model["format"], model["family"]) == ("node", "python_source", "mlp")
    assert model["parameters"] == 46 and [layer["parameters"] for layer in model["layers"]] == [36, 10]
    assert "input_shape" in model["unknown"]


def test_a_configuration_gives_layers_with_their_work_and_no_weights_travel(made: Cluster, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'hive[hf]'")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    built = transformers.BertForSequenceClassification(config)
    built.save_pretrained(tmp_path / "bert")
    model = identified(made, tmp_path / "bert")
    assert model["seen_by"] == "node" and model["task"] == "classification"
    assert model["parameters"] == sum(value.numel() for value in built.parameters())
    assert model["requirements"]["source"] == "layers" and model["input_shape"]
    assert sum(layer["flops_per_sample"] for layer in model["layers"]) > 0
    (tmp_path / "bert" / "model.safetensors").unlink()
    without = identified(made, tmp_path / "bert")
    assert without["parameters"] == model["parameters"]


def test_an_exported_program_says_what_it_takes(made: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(nn.Linear(6, 3), (torch.zeros(4, 6),), dynamic_shapes=shapes), path)
    model = identified(made, path)
    assert (model["seen_by"], model["parameters"], model["input_shape"]) == ("node", 21, [6])


def test_code_that_fails_is_said_with_its_own_traceback(made: Cluster, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("def build():\n    raise ValueError('no such net')\n")
    done = made.hive("models", "identify", f"{tmp_path}/net.py:build", check=False)
    assert done.returncode == 3 and "no such net" in done.stderr
    local = made.hive("models", "identify", "--local", f"{tmp_path}/net.py:build")
    assert local.returncode == 0 and "a node would build it" in local.stdout
