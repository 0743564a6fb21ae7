"""What the benchmarks of the strategies train, and how one of them is forced.

Sizes are fixed, so that figures of different days compare. A number of steps is chosen by `steps_for`, from a predicted
time: a run has to be long enough for its steps to be timed and short enough to be repeated.
"""

from __future__ import annotations

from dataclasses import replace

from bench.workloads import DIGITS_CNN, GPT_10M, SEQUENCE, Strategy, Workload

MLP = Workload("MLP 0.3 M", "examples/digits", "mlp", {"hidden": 512}, "rows", batch=128, steps=500)
CNN = replace(DIGITS_CNN, name="CNN", batch=64, steps=500)
GPT_SMALL = Workload(
    "GPT 0.9 M",
    "examples/textlm",
    "gpt",
    {"width": 128, "layers": 4, "heads": 4, "context": SEQUENCE},
    "text",
    batch=16,
    steps=50,
)
GPT_MEDIUM = replace(GPT_10M, batch=8)
LSTM = Workload("LSTM 0.3 M", "bench/lstm", "lstm", {"width": 128, "layers": 2}, "text", batch=16, steps=50)
MODELS = (MLP, CNN, GPT_SMALL, GPT_MEDIUM, LSTM)

SHARDED: Strategy = {"model_parallel": {"kind": "sharded"}}
TENSOR: Strategy = {"model_parallel": {"kind": "tensor"}}
HYBRID: Strategy = {"pipeline_parallel": {"stages": 2, "replicas": 2}}


def pipeline(stages: int, micro_batches: int) -> Strategy:
    return {"pipeline_parallel": {"stages": stages, "microbatches": micro_batches}}


def name_of(strategy: Strategy) -> str:
    """For tables: `pipeline_parallel (stages 2, replicas 2)`."""
    if isinstance(strategy, str):
        return strategy
    name, options = next(iter(strategy.items()))
    return f"{name} ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else name


def steps_for(seconds: float, step_s: float, least: int = 4, most: int = 2000) -> int:
    """So many steps of a predicted `step_s` that a run takes about `seconds`, within bounds."""
    return max(least, min(most, round(seconds / max(step_s, 1e-9))))
