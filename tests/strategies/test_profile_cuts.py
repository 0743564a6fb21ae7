"""What identification says about cutting a model: bytes after each layer, tied parameters, or why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_profile_torch import Job

from protos.jobspec import parse
from protos.model import LayerProfile, ModelProfile
from strategies.profile_cuts_torch import EXAMINED_PARAMETERS, why_not_examined
from strategies.profile_torch import condensed

MLP = "def build(): return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))"
GPT = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])

class Tied(nn.Module):
    def __init__(self, functional):
        super().__init__()
        self.token, self.place = nn.Embedding(50, 16), nn.Embedding(8, 16)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(16)
        self.functional = functional
        if not functional:
            self.head = nn.Linear(16, 50, bias=False)
            self.head.weight = self.token.weight

    def forward(self, tokens):
        x = self.token(tokens) + self.place(torch.arange(8))
        x = self.norm(self.blocks(x))
        return F.linear(x, self.token.weight) if self.functional else self.head(x)

def build(functional): return Tied(functional)
"""
BRANCHING = """
class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x)
        return self.b(x * 2 if x.sum() > 0 else x)

def build(): return Branching()
"""


def profile(folder: Path, code: str, **job: Any) -> ModelProfile:
    return Job(folder, code, strategy="pipeline_parallel", **job).identified().profile


def cuts(found: ModelProfile) -> dict[str, float]:
    return {layer.name: layer.cut_bytes_per_sample for layer in found.layers if layer.cut_bytes_per_sample is not None}


def test_bytes_after_each_layer_where_a_cut_makes_sense(tmp_path: Path) -> None:
    found = profile(tmp_path, MLP)
    assert found.why_not_cut == ""
    assert cuts(found) == {"1": 32 * 4, "3": 16 * 4}  # not before the activation, which belongs to the left


@pytest.mark.parametrize("functional", [True, False])
def test_tied_parameters_are_borrowed_by_the_last_layer(functional: bool, tmp_path: Path) -> None:
    train = {"loss": "causal_lm"}
    found = profile(
        tmp_path,
        GPT,
        shape=(8,),
        token_ids=True,
        args={"functional": functional},
        train=train,
        target=np.zeros((40, 8), np.int64),
    )
    assert found.why_not_cut == ""
    borrowed = {layer.name: layer.borrowed_parameters for layer in found.layers if layer.borrowed_parameters}
    assert borrowed == {"norm" if functional else "head": 50 * 16}
    assert sum(layer.parameters for layer in found.layers) == found.parameters
    between = cuts(found)
    assert between["blocks.0.out"] == 8 * 16 * 4 and between["blocks.0.norm"] == 2 * 8 * 16 * 4
    assert "blocks.0" not in between  # it lies around its parts: after it is after none of them


def test_a_model_that_cannot_be_traced_is_identified_and_says_why(tmp_path: Path) -> None:
    found = profile(tmp_path, BRANCHING)
    assert found.parameters == 8 * 8 + 8 + 8 * 4 + 4
    assert "depends on the values of a tensor" in found.why_not_cut
    assert not cuts(found)


def test_one_layer_has_nothing_to_cut(tmp_path: Path) -> None:
    assert (
        profile(tmp_path, "def build(): return nn.Linear(8, 4)").why_not_cut
        == "no layer with parameters follows another"
    )


def test_a_model_that_is_built_from_values_is_cut_all_the_same(tmp_path: Path) -> None:
    code = MLP.replace("return", "torch.linspace(0, 1, 3)[1].item(); return")
    assert cuts(profile(tmp_path, code)) == {"1": 32 * 4, "3": 16 * 4}


def test_joined_layers_can_be_cut_after_the_last_and_borrow_what_all_do() -> None:
    layers = tuple(
        LayerProfile(f"l{n}", "Linear", 10, 1.0, 1.0, 1.0, (1,), float(n) if n != 3 else None, n) for n in range(6)
    )
    joined = condensed(layers, 3)
    assert [layer.name for layer in joined] == ["l0..l1", "l2..l3", "l4..l5"]
    assert [layer.cut_bytes_per_sample for layer in joined] == [1.0, None, 5.0]
    assert [layer.borrowed_parameters for layer in joined] == [1, 5, 9]


@pytest.mark.parametrize(
    ("job", "parameters", "words"),
    [
        ({"strategy": "pipeline_parallel"}, 10, ""),
        ({"strategy": "model_parallel"}, 10, ""),
        ({"strategy": "single_node"}, 10**9, "the strategy is single_node"),
        ({}, EXAMINED_PARAMETERS, ""),
        ({}, EXAMINED_PARAMETERS - 1, "small"),
        ({"nodes": {"max": 1}}, 10**9, "nodes.max"),
        ({"train": {"batch_size": 1}}, 10**9, "batch_size"),
    ],
)
def test_it_is_examined_only_where_it_can_matter(job: dict[str, Any], parameters: int, words: str) -> None:
    spec = parse({"model": {"source": "m.py:build"}, "data": {"source": "t.npz"}, **job})
    found = why_not_examined(spec, parameters)
    assert words in found and bool(found) == bool(words)


LSTM = """
class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 16, batch_first=True)

    def forward(self, x):
        return self.lstm(x.view(-1, 2, 4))[0][:, -1]

def build(): return Last()
"""


@pytest.mark.parametrize(
    ("code", "ranks", "words"),
    [
        (MLP, {2, 4, 8}, ""),
        (LSTM, set(), "rnn"),
    ],
)
def test_among_how_many_ranks_single_layers_can_be_cut(tmp_path: Path, code: str, ranks: set[int], words: str) -> None:
    found = profile(tmp_path, code)
    assert ranks <= set(found.tensor_ranks) and bool(found.tensor_ranks) == bool(ranks)
    assert words in found.why_not_tensor if words else not found.why_not_tensor
