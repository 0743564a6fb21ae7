"""Sharded training as torch ships it: torchrun starts this on each rank, FSDP2 (fully_shard) over gloo.

torchrun --standalone --nproc-per-node 2 bench/peers/torchrun_fsdp2.py WORKLOAD.json THREADS

For models whose `blocks` are their repeated part, as its tutorial asks: one unit for each block, one for the rest.
Rank 0 prints one JSON line.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main(path: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = load(path)
    mesh, model = init_device_mesh("cpu", (ranks,)), inputs.model
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = inputs.optimizer()
    generator = torch.Generator().manual_seed(inputs.seed)
    rows, step, samples, loss = len(inputs.features), 0, 0, torch.zeros(())
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
    dist.barrier()
    seconds = time.perf_counter() - started
    if rank == 0:
        print(json.dumps({"samples": samples, "seconds": seconds, "loss": loss.item()}))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
