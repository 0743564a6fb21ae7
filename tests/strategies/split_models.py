"""Models of every family that is cut, small."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

EXAMPLE = Path(__file__).parents[2] / "examples" / "textlm" / "model.py"


def mlp() -> nn.Module:
    widths = (8, 16, 12, 16, 10, 4)
    layers: list[nn.Module] = []
    for first, second in pairwise(widths):
        layers += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def gpt() -> nn.Module:
    specification = importlib.util.spec_from_file_location("textlm_example", EXAMPLE)
    assert specification is not None and specification.loader is not None
    textlm = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(textlm)
    module: nn.Module = textlm.gpt(32, 3, 2, 16)
    return module


class TiedGPT(nn.Module):
    """The head is the embedding, as a module of its own or used as a function."""

    def __init__(self, functional_head: bool) -> None:
        super().__init__()
        self.body = gpt()
        self.functional_head = functional_head
        self.body.head.weight = self.body.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.functional_head:
            answer: Tensor = self.body(tokens)
            return answer
        body = self.body
        x = body.token(tokens) + body.position(torch.arange(tokens.shape[1], device=tokens.device))
        return functional.linear(body.norm(body.blocks(x)), body.token.weight)


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(50, 8)
        self.first = nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True)
        self.second = nn.LSTM(24, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        values, _ = self.first(self.token(tokens))
        _, (hidden, _) = self.second(values.transpose(0, 1))
        answer: Tensor = self.head(hidden[-1])
        return answer


class Skips(nn.Module):
    """The input and the first layer's output are used again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x).relu()
        answer: Tensor = self.d(self.c(torch.tanh(self.b(first))) + first + x)
        return answer


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Encoder(nn.Module):
    """Takes its inputs by name and answers like Hugging Face models do; each layer needs the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Answer:
        x = self.token(input_ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=attention_mask == 0)
        return Answer(self.head(x[:, 0]), x)


class Corners(nn.Module):
    """What a graph can hold beside layers: writes in place, tensors that are no state, a block without gradients, sizes
    that are arithmetic on the batch, an unused layer, a frozen one, one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(8, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.end = nn.Linear(4, 4)
        self.unused = nn.Linear(2, 2)
        self.mark = nn.Parameter(torch.randn(1, 1, 8))
        self.mask = torch.tril(torch.ones(8, 8))
        self.register_buffer("scale", torch.full((8,), 1.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        x = torch.cat([self.mark.expand(batch, 1, -1), self.first(x)], 1).reshape(batch * (length + 1), width)
        ones = torch.zeros(batch * (length + 1), 1)
        ones[:] = 1.0
        x = self.relu(self.norm(x @ self.mask) * ones * self.scale)
        with torch.no_grad():
            mean = x.mean(1, keepdim=True)
        x = self.relu(self.last(x) + mean)
        x = self.end(self.frozen(x))
        out = torch.zeros(batch, 4)
        out[:, 0] = x.view(batch, length + 1, 4).mean(1)[:, 0]
        return out + x.view(batch, length + 1, 4)[:, 1] * torch.tensor(2.0)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.sum() > 0:
            x = x * 2
        answer: Tensor = self.b(x)
        return answer


class OneBatchSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.b(self.a(x).reshape(4, 8))
        return answer


class SharedNorm(nn.Module):
    """One batch norm called on both sides of every cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.norm(self.b(self.norm(self.a(x))))
        return answer


class WholeBatchValue(nn.Module):
    """A number of the whole batch crosses every cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        level = x.abs().mean()
        answer: Tensor = self.c(torch.tanh(self.b(x))) * level
        return answer


class OwnBackward(nn.Module):
    """Its gradient is not that of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.b(Tripled.apply(self.a(x)))
        return answer


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


class OtherInEvaluation(nn.Module):
    """Another path in evaluation, statistics without parameters, and a constant of its own in each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x * torch.tensor(2.0) if self.training else x * torch.tensor(3.0) + 1
        answer: Tensor = self.last(functional.dropout(self.norm(x), 0.0, self.training))
        return answer
