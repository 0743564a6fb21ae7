"""Pipeline training as torch ships it: torchrun starts this on each stage; torch.distributed.pipelining, 1F1B, gloo.

torchrun --standalone --nproc-per-node 2 bench/peers/torchrun_pipelining.py WORKLOAD.json THREADS MICRO_BATCHES

For the GPT of examples/textlm, cut by hand into stages of as many blocks each: embeddings before the first, norm and
head after the last. Shapes are declared, so nothing is traced or pickled between ranks. The last stage prints one JSON
line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from inputs import load, mean_loss
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B


class Part(nn.Module):
    def __init__(self, gpt: nn.Module, stage: int, stages: int) -> None:
        super().__init__()
        share = len(gpt.blocks) // stages
        self.first, self.last = stage == 0, stage == stages - 1
        if self.first:
            self.token, self.position = gpt.token, gpt.position
        self.blocks = gpt.blocks[stage * share : len(gpt.blocks) if self.last else (stage + 1) * share]
        if self.last:
            self.norm, self.head = gpt.norm, gpt.head

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.token(x) + self.position(torch.arange(x.shape[1]))
        x = self.blocks(x)
        return self.head(self.norm(x)) if self.last else x


def main(path: Path, threads: int, micro_batches: int) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo")
    stage, stages = dist.get_rank(), dist.get_world_size()
    inputs = load(path)
    tokens = inputs.features[: inputs.batch // micro_batches]
    hidden = torch.empty(*tokens.shape, inputs.model.token.embedding_dim, requires_grad=True)
    logits = torch.empty(*tokens.shape, inputs.model.head.out_features, requires_grad=True)
    part = Part(inputs.model, stage, stages)
    given, made = (tokens if part.first else hidden), (logits if part.last else hidden)
    runtime = PipelineStage(part, stage, stages, torch.device("cpu"), input_args=(given,), output_args=(made,))
    schedule = Schedule1F1B(runtime, micro_batches, loss_fn=mean_loss)
    optimizer = replace(inputs, model=part).optimizer()
    generator = torch.Generator().manual_seed(inputs.seed)
    rows, step, samples, losses = len(inputs.features), 0, 0, [torch.zeros(())]
    part.train()
    dist.barrier()
    started = time.perf_counter()
    while step < inputs.steps:
        order = torch.randperm(rows, generator=generator)
        for indices in order.split(inputs.batch):
            if step == inputs.steps:
                break
            optimizer.zero_grad()
            losses = []
            features = (inputs.features[indices],) if part.first else ()
            target = inputs.targets[indices] if part.last else None
            schedule.step(*features, target=target, losses=losses if part.last else None, return_outputs=False)
            optimizer.step()
            step += 1
            samples += len(indices)
    dist.barrier()
    seconds = time.perf_counter() - started
    if part.last:
        loss = torch.stack(losses).mean().item()
        print(json.dumps({"samples": samples, "seconds": seconds, "loss": loss}))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
