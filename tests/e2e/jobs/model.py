import time

import torch
from torch import nn


def mlp(hidden: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


class Hesitates(nn.Module):
    """On half of a batch it takes a quarter of a second longer: no prediction can know that."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.layers = wide()
        self.batch = batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == self.batch // 2 and self.training:
            time.sleep(0.25)
        return self.layers(x)


def hesitant(batch: int = 512) -> nn.Module:
    return Hesitates(batch)


def broken() -> nn.Module:
    raise RuntimeError("the architect forgot the roof")


class Diverges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * float("nan")


def diverges() -> nn.Module:
    return Diverges()


class TinyGPT(nn.Module):
    """One block over bytes [N, length], without dropout, and without biases: the gradient of a key's bias is rounding
    noise (softmax takes it out), which Adam would blow up to whole steps."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(length, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True, bias=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.token(tokens) + self.position(torch.arange(length))
        return self.head(self.block(x, src_mask=mask, is_causal=True))


def gpt(width: int = 32, length: int = 32) -> nn.Module:
    return TinyGPT(width, length)


class Trips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += not x.is_meta
        if self.calls == 3:
            raise ValueError(f"tripped at {self.calls}")
        return self.layer(x)


def trips() -> nn.Module:
    return Trips()


def pair() -> nn.Module:
    return nn.Linear(2, 2)


class Sleeps(nn.Module):
    """Hangs in its third step: a loop without an end in somebody's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        if self.steps > 2:
            time.sleep(100_000)
        return self.layer(x)


def sleeps() -> nn.Module:
    return Sleeps()


def tower(width: int = 1024, depth: int = 4) -> nn.Module:
    """`depth` layers of width x width: as large as asked for."""
    layers: list[nn.Module] = [nn.Linear(64, width), nn.Tanh()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Reader(nn.Module):
    """Reads an 8 x 8 picture row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rows(x.view(-1, 8, 8))[0][:, -1])


def reader() -> nn.Module:
    return Reader()
