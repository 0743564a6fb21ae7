"""Two classifiers of 8x8 handwritten digits: 64 pixels between 0 and 1 in, 10 classes out."""

import torch
from torch import nn


def mlp(hidden: int = 128) -> nn.Module:
    """For flat rows of 64 pixels."""
    return nn.Sequential(
        nn.Linear(64, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


class SmallCNN(nn.Module):
    """For images of one channel, [N, 1, 8, 8]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classify = nn.Linear(2 * channels * 4 * 4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(images).flatten(1))


def cnn(channels: int = 16) -> nn.Module:
    return SmallCNN(channels)
