"""Data parallel training as torch ships it: torchrun starts this on each rank, DistributedDataParallel over gloo.

torchrun --standalone --nproc-per-node 2 bench/peers/torchrun_ddp.py WORKLOAD.json THREADS

Rank 0 prints one JSON line; `first_step` is the Unix time at which the first step was done.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from inputs import load, mean_loss
from torch.nn.parallel import DistributedDataParallel


def main(path: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = load(path)
    optimizer = inputs.optimizer()
    model = DistributedDataParallel(inputs.model)
    generator = torch.Generator().manual_seed(inputs.seed)
    rows, step, samples, first_step, loss = len(inputs.features), 0, 0, 0.0, torch.zeros(())
    model.train()
    dist.barrier()
    started = time.perf_counter()
    while step < inputs.steps:
        order = torch.randperm(rows, generator=generator)
        for indices in order.split(inputs.batch):
            if step == inputs.steps:
                break
            mine = indices.tensor_split(ranks)[rank]
            optimizer.zero_grad()
            loss = mean_loss(model(inputs.features[mine]), inputs.targets[mine])
            loss.backward()
            optimizer.step()
            step += 1
            samples += len(indices)
            if step == 1:
                first_step = time.time()
    dist.barrier()
    seconds = time.perf_counter() - started
    if rank == 0:
        print(json.dumps({"samples": samples, "seconds": seconds, "loss": loss.item(), "first_step": first_step}))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a process that used DDP over gloo may abort in the interpreter's exit, which torchrun calls a failure


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
