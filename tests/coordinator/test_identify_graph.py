"""Networks over graphs: by the names of their classes, and by the names of their tensors where there are no others."""

from __future__ import annotations

import io
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import save
from torch import nn

from coordinator.identify import parse
from protos.model import Family, ModelProfile

# as PyTorch Geometric and DGL name what their layers hold
NAMES = {
    "GCNConv": {"convs.0.bias": (16,), "convs.0.lin.weight": (16, 8), "out.weight": (4, 16), "out.bias": (4,)},
    "GATConv": {"a.att_src": (1, 2, 8), "a.att_dst": (1, 2, 8), "a.bias": (16,), "a.lin.weight": (16, 8)},
    "SAGEConv": {"c1.lin_l.weight": (16, 8), "c1.lin_l.bias": (16,), "c1.lin_r.weight": (16, 8)},
    "GraphConv": {"x.lin_rel.weight": (16, 8), "x.lin_rel.bias": (16,), "x.lin_root.weight": (16, 8)},
    "GINConv by its name": {"ginconv1.nn.0.weight": (16, 8), "ginconv1.nn.0.bias": (16,)},
    "GraphConv of DGL": {"conv1.weight": (8, 16), "conv1.bias": (16,), "conv2.weight": (16, 4), "conv2.bias": (4,)},
    "GATConv of DGL": {"l.0.attn_l": (1, 2, 8), "l.0.attn_r": (1, 2, 8), "l.0.fc.weight": (16, 8)},
    "SAGEConv of DGL": {"l.0.fc_self.weight": (16, 8), "l.0.fc_neigh.weight": (16, 8), "l.0.bias": (16,)},
}  # fmt: skip
OTHERS = {
    "an image network": ({"conv1.weight": (8, 3, 3, 3), "conv1.bias": (8,), "fc.weight": (4, 8)}, Family.CNN),
    "a text network": ({"convs.0.weight": (8, 16, 3), "convs.0.bias": (8,), "fc.weight": (4, 8)}, Family.CNN),
    "ConvBERT": (
        {"e.attention.conv_kernel_layer.weight": (9, 8), "e.attention.query.weight": (8, 8)},
        Family.TRANSFORMER,
    ),
    "a gate": ({"gate.weight": (8, 8), "gating.lin.weight": (8, 8), "gating.bias": (8,)}, Family.MLP),
    "global convolutions": (
        {"gcn1.l.0.weight": (2, 8, 7, 1), "gcn1.bn.weight": (2,), "gcn1.bn.bias": (2,)},
        Family.CNN,
    ),
    "a squeezed convolution of a language model": (
        {"emb.weight": (16, 8), "norm.weight": (8,), "norm.bias": (8,), "m.conv.weight": (8, 4), "m.conv.bias": (8,)},
        Family.TRANSFORMER,
    ),
    "a left side alone": ({"lin_l.weight": (8, 8), "lin_l.bias": (8,)}, Family.LINEAR),
}


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def identify(content: bytes) -> ModelProfile:
    return parse.identify(io.BytesIO(content))


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_names_of_tensors_make_a_graph_network(name: str) -> None:
    state = tensors(NAMES[name])
    for profile in (identify(saved(state)), identify(save(state))):
        assert (profile.family, profile.parameters) == (Family.GNN, sum(map(torch.Tensor.numel, state.values())))
        assert profile.confidence <= 0.6  # by names alone


@pytest.mark.parametrize("name", OTHERS)
def test_like_names_of_other_networks_do_not(name: str) -> None:
    shapes, family = OTHERS[name]
    assert identify(save(tensors(shapes))).family is family


@pytest.mark.parametrize("kind", ["GCNConv", "GATConv", "GraphConvolution"])
def test_a_pickled_module_is_known_by_its_classes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def __init__(self: nn.Module, inputs: int, outputs: int) -> None:
        nn.Module.__init__(self)
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    module = ModuleType("graph_layers")
    layer = type(kind, (nn.Module,), {"__init__": __init__, "__module__": "graph_layers"})
    setattr(module, kind, layer)
    monkeypatch.setitem(sys.modules, "graph_layers", module)
    profile = identify(saved(nn.Sequential(layer(8, 16), layer(16, 4))))
    assert (profile.format, profile.family) == ("pickled_module", Family.GNN)
    assert profile.parameters == 8 * 16 + 16 + 16 * 4 + 4 and profile.confidence == 0.9
