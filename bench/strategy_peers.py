"""Each strategy beside what plain torch has for it, used by hand on the same two equal nodes: samples/s of the loop.

data_parallel beside DistributedDataParallel, model_parallel beside FSDP2's fully_shard, pipeline_parallel beside
torch.distributed.pipelining, all over gloo on loopback. A round is peer, hive, peer, as in bench/throughput.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.cluster import NODES, running, torchrun
from bench.report import Bound, Figure, Finding, Gate
from bench.stage import Stage
from bench.strategy_jobs import SHARDED, pipeline
from bench.throughput import compared, interleaved
from bench.workloads import GPT_10M, Strategy, Written, write

GATE = Gate(Bound.AT_LEAST, 0.95)
MICRO_BATCHES = 4
QUICK_STEPS = 3


@dataclass(frozen=True, slots=True)
class Rival:
    """`script` lies in bench/peers; `steps` are of one run."""

    name: str
    strategy: Strategy
    script: str
    arguments: tuple[str, ...] = ()
    steps: int = 20


RIVALS = (
    Rival("DDP", "data_parallel", "torchrun_ddp.py"),
    Rival("FSDP2", SHARDED, "torchrun_fsdp2.py", steps=15),
    Rival(
        "torch pipelining",
        pipeline(len(NODES), MICRO_BATCHES),
        "torchrun_pipelining.py",
        (str(MICRO_BATCHES),),
    ),
)


def peers(stage: Stage) -> Finding:
    figures: list[Figure] = []
    detail: dict[str, Any] = {}
    with running(stage.subfolder("peers"), threads=stage.threads) as cluster:
        for rival in RIVALS:
            sized = replace(GPT_10M, batch=len(NODES) * GPT_10M.batch, steps=stage.either(rival.steps, QUICK_STEPS))
            workload = replace(sized, name=f"{GPT_10M.name}, {rival.name}")
            written = write(workload, rival.strategy, NODES, stage.subfolder("jobs"))
            rounds, runs = interleaved(stage, cluster, written, partial(_run, rival, stage.threads))
            figures += compared(stage, f"hive / {rival.name}", workload, rounds, GATE)
            detail[rival.name] = runs
    return Finding("peers", tuple(figures), detail)


def _run(rival: Rival, threads: int, written: Written) -> dict[str, Any]:
    return torchrun(rival.script, written, len(NODES), threads, *rival.arguments)
