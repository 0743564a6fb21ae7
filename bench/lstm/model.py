"""A small LSTM over bytes: predicts the next byte of Python source."""

import torch
from torch import nn

VOCABULARY = 256


class ByteLSTM(nn.Module):
    """Bytes [N, length] in, logits [N, length, 256] out."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.recurrent = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens)
        for layer in self.recurrent:
            x = layer(x)[0]
        logits: torch.Tensor = self.head(x)
        return logits


def lstm(width: int = 128, layers: int = 2) -> nn.Module:
    return ByteLSTM(width, layers)
