"""A regression on ten measurements of a patient, in the order of `data.features` in regression.yaml."""

import torch
from torch import Tensor, nn

# Mean and standard deviation of each column over the training rows, and of the target: the file holds raw values.
MEANS = [48.198, 1.452, 26.337, 94.453, 189.155, 115.531, 49.552, 4.097, 4.648, 90.887]
DEVIATIONS = [13.1, 0.498, 4.446, 13.735, 33.679, 29.544, 12.735, 1.293, 0.523, 11.447]
TARGET_MEAN, TARGET_DEVIATION = 152.136, 76.432


class Regression(nn.Module):
    """[N, 10] raw measurements in, [N, 1] progression of the disease out."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor(MEANS))
        self.register_buffer("deviations", torch.tensor(DEVIATIONS))
        self.layers = nn.Sequential(nn.Linear(len(MEANS), hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, measurements: Tensor) -> Tensor:
        scaled = (measurements - self.means) / self.deviations
        return TARGET_MEAN + TARGET_DEVIATION * self.layers(scaled)


def build(hidden: int = 32) -> nn.Module:
    return Regression(hidden)
