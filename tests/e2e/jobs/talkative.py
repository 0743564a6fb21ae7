import torch
from model import mlp
from torch import nn


def build(hidden: int = 64) -> nn.Module:
    print("built")  # noqa: T201 (what a user prints)
    return mlp(hidden)


def sample(model: nn.Module) -> str:
    return f"the sample: {model(torch.zeros(1, 64)).shape[1]}"
