"""Ten kinds of architecture of transformers, identified as a node does it, against AutoModel on the meta device.

The same comparison for every type is bench/identify_transformers.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'hive[hf]'")

import torch
import transformers
from torch import nn

from bench.identify_transformers import auto_mappings, examined, identified
from protos.errors import SpecError
from protos.model import Family
from strategies.profile_model_torch import profile_of_model

TYPES = {
    "bert": "transformer", "gpt2": "transformer", "t5": "transformer", "mixtral": "transformer", "vit": "transformer",
    "whisper": "transformer", "internlm3": "transformer", "resnet": "cnn", "mamba": "rnn", "patchtsmixer": "mlp",
}  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_parameters_layers_and_family_are_those_of_the_model(model_type: str, tmp_path: Path) -> None:
    result = examined(model_type, auto_mappings()[model_type], tmp_path)
    assert (result.problem, result.skipped) == ("", "")
    assert result.parameters == result.expected > 0
    assert result.family == TYPES[model_type]


def test_tied_weights_count_once_and_nothing_is_allocated(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=2, architectures=["GPT2LMHeadModel"], n_embd=2**13, n_head=8)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    profile = identified(tmp_path)
    assert profile.parameters == 2_030_936_064 and profile.task == "language_model"
    assert profile.requirements.source == "layers" and profile.input_shape == (32,)


def test_initial_values_that_look_at_values_need_none(tmp_path: Path) -> None:
    """SigLIP draws again what lies outside of bounds: without values there is nothing to look at."""
    config = transformers.SiglipVisionConfig(num_hidden_layers=1, architectures=["SiglipVisionModel"])
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert identified(tmp_path).requirements.source == "layers"


def test_a_model_of_another_configuration_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(architectures=["GPT2LMHeadModel"])
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(SpecError, match="is not built from a bert configuration"):
        identified(tmp_path)


def test_layers_that_are_shared_or_never_run_are_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again = self.first
            self.unused = nn.LSTM(4, 4)
            self.scale = nn.Parameter(torch.ones(3))

    profile = profile_of_model(Net(), None, "python_source")
    assert {layer.name: layer.parameters for layer in profile.layers} == {"model": 3, "first": 20, "unused": 160}
    assert profile.parameters == 183 and profile.family is Family.RNN
    assert {"flops_per_sample", "input_shape"} <= set(profile.unknown)
