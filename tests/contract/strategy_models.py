"""The small models of the contract of the strategies. This file is also the code of their jobs: it is copied beside
them.

Layers whose gradient is rounding noise (a bias before a norm, the bias of a key) are left out: Adam would blow the
noise up to whole steps, and no two ways to add up numbers would agree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8, momentum=0.3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 4),
    )


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        normed = self.norm1(x)
        parts = (
            each(normed).view(rows, length, -1, width // self.heads) for each in (self.query, self.key, self.value)
        )
        query, key, value = (part.transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, -1))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Tied: the head is the embedding."""

    def __init__(self, vocabulary: int, width: int, length: int, blocks: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt() -> nn.Module:
    return Gpt(32, 16, 12, 3)


class Lstm(nn.Module):
    """Two recurrent layers over [N, 4, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(3, 10)
        self.first = nn.LSTM(10, 12, batch_first=True)
        self.second = nn.LSTM(12, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.first(torch.tanh(self.into(x)))
        x, _ = self.second(x)
        return self.head(x[:, -1])


def lstm() -> nn.Module:
    return Lstm()
