"""The training loop a person would write: one process, plain torch. Prints one JSON line.

python bench/peers/plain_loop.py WORKLOAD.json THREADS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from inputs import load, mean_loss


def main(path: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    inputs = load(path)
    model, optimizer = inputs.model, inputs.optimizer()
    generator = torch.Generator().manual_seed(inputs.seed)
    rows, step, samples, loss = len(inputs.features), 0, 0, torch.zeros(())
    model.train()
    started = time.perf_counter()
    while step < inputs.steps:
        order = torch.randperm(rows, generator=generator)
        for indices in order.split(inputs.batch):
            if step == inputs.steps:
                break
            optimizer.zero_grad()
            loss = mean_loss(model(inputs.features[indices]), inputs.targets[indices])
            loss.backward()
            optimizer.step()
            step += 1
            samples += len(indices)
    seconds = time.perf_counter() - started
    print(json.dumps({"samples": samples, "seconds": seconds, "loss": loss.item()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
