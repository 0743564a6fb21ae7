"""How fast this worker computes, in under four seconds of an idle machine.

Owns the three measurements the cost model needs: matmul FLOP/s per dtype, memory bandwidth, and for each family of
layers the sustained training speed (forward, backward and optimizer) and the fixed cost of a step. Every figure comes
from windows of back-to-back work, bounded by time, in CPU time, which other programs do not disturb; medians over
windows that alternate between sizes keep the rest out. What a cap takes away is not in it: node/calibration_run.py
knows the cap. All figures are positive.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from protos import documents
from protos.capacity import Calibration, FamilyRate, Rate
from protos.states import AttemptState
from protos.work import Outcome
from strategies.context import TaskContext
from strategies.faults_torch import Stopped, fault_of

_RATE_SHARE = 0.1  # of the budget, for each dtype and for memory
_FAMILY_SHARE = 0.13
_RATE_WINDOWS = 5
_FAMILY_ROUNDS = 3
_COPY_BYTES = 64 * 1024 * 1024
_SMALLEST_OVERHEAD_S = 1e-6
_ADAM_BYTES = 28  # read weights, gradients and both moments, write all but the gradients: as strategies/cost.py counts


@dataclass(frozen=True, slots=True)
class Workload:
    """A small model of one family and the two batch sizes it is timed at."""

    model: nn.Module
    sample: torch.Tensor  # one row of features, without the batch dimension
    classes: int
    forward_flops: float  # per sample
    batches: tuple[int, int]


class _Mean(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.mean(1)


class _Last(nn.Module):
    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.recurrent(features)[0][:, -1])
        return output


def workloads() -> dict[str, Callable[[], Workload]]:
    """One per family; the FLOPs are those of the products, as identification counts them."""
    return {"matmul": _matmul, "conv": _conv, "rnn": _rnn, "embedding": _embedding, "tiny": _tiny}


def _matmul() -> Workload:
    width, classes = 256, 16
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 16))
    return Workload(model, torch.randn(width), classes, 2.0 * width * (2 * width + classes), (32, 256))


def _conv() -> Workload:
    side, classes = 16, 10
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes),
    )  # fmt: skip
    flops = 2.0 * 9 * side * side * (3 * 16 + 16 * 32) + 2.0 * 32 * classes
    return Workload(model, torch.randn(3, side, side), classes, flops, (4, 32))


def _rnn() -> Workload:
    steps, width, hidden, classes = 16, 32, 64, 10
    flops = steps * 2.0 * 4 * hidden * (width + hidden) + 2.0 * hidden * classes
    return Workload(_Last(width, hidden, classes), torch.randn(steps, width), classes, flops, (4, 64))


def _embedding() -> Workload:
    tokens, width, classes = 32, 64, 64
    model = nn.Sequential(nn.Embedding(4096, width), _Mean(), nn.Linear(width, classes))
    return Workload(model, torch.randint(4096, (tokens,)), classes, 2.0 * width * classes, (32, 512))


def _tiny() -> Workload:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return Workload(model, torch.randn(16), 4, 2.0 * (16 * 16 + 16 * 4), (16, 1024))


def calibrate(context: TaskContext) -> Outcome:
    """Outcome.document is a Calibration as JSON; a failure is a fault of the node."""
    try:
        calibration = measure(context.device, context.threads, stop=lambda: _stop_if_asked(context))
        return Outcome(AttemptState.DONE, document=documents.encode(calibration).decode())
    except Exception as error:
        return Outcome(AttemptState.FAILED, fault=fault_of(error, context.workspace.code_dir))


def measure(
    device: str = "cpu", threads: int = 1, *, budget_s: float = 2.8, stop: Callable[[], None] = lambda: None
) -> Calibration:
    """All measurements on one device. `stop` is called between them and may raise to end early."""
    torch.set_num_threads(max(threads, 1))
    started = time.perf_counter()
    flops = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        stop()
        flops[name] = matmul_rate(dtype, device, budget_s * _RATE_SHARE)
    bandwidth = copy_rate(device, budget_s * _RATE_SHARE)
    families = {}
    for name, make in workloads().items():
        stop()
        families[name] = family_rate(make(), device, budget_s * _FAMILY_SHARE, bandwidth.p50)
    return Calibration(flops, bandwidth, families, torch.__version__, threads, time.perf_counter() - started)


def matmul_rate(dtype: torch.dtype, device: str, budget_s: float) -> Rate:
    size = 4096 if device.startswith("cuda") else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    output = torch.empty_like(left)
    return _rate(lambda: torch.mm(left, right, out=output), 2.0 * size**3, device, budget_s)


def copy_rate(device: str, budget_s: float) -> Rate:
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), 2.0 * _COPY_BYTES, device, budget_s)


def family_rate(work: Workload, device: str, budget_s: float, bytes_per_s: float) -> FamilyRate:
    """Time whole training steps at two batch sizes in turn: the slope is the speed, the intercept the fixed cost.

    The fixed cost is without the optimizer's memory traffic, which the cost model counts by the model's own size.
    """
    model = work.model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss_function = nn.CrossEntropyLoss()
    steps = []
    for batch in work.batches:
        features = work.sample.to(device).expand(batch, *work.sample.shape).contiguous()
        target = torch.zeros(batch, dtype=torch.long, device=device)

        def step(features: torch.Tensor = features, target: torch.Tensor = target) -> None:
            optimizer.zero_grad()
            loss_function(model(features), target).backward()
            optimizer.step()

        step()  # allocations and kernel choice happen once per shape
        steps.append(step)
    window_s = budget_s / (_FAMILY_ROUNDS * len(steps))
    seconds: list[list[float]] = [[], []]
    for _ in range(_FAMILY_ROUNDS):
        for times, step in zip(seconds, steps, strict=True):
            times.append(_window(step, device, window_s))
    flops = (3.0 * work.forward_flops * work.batches[0], 3.0 * work.forward_flops * work.batches[1])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return fit(flops, (seconds[0], seconds[1]), _ADAM_BYTES * parameters / bytes_per_s)


def fit(
    flops: tuple[float, float], seconds: tuple[Sequence[float], Sequence[float]], elsewhere_s: float = 0.0
) -> FamilyRate:
    """step time = elsewhere_s + overhead_s + FLOP / flops through the medians; no figure is ever non-positive.

    Where the larger batch was not slower (overhead only), or more than proportionally slower (caches), the line
    through the origin and the larger batch bounds the speed from what was really seen.
    """
    small, large = statistics.median(seconds[0]), statistics.median(seconds[1])
    slope = (large - small) / (flops[1] - flops[0])
    overhead = small - flops[0] * slope
    if slope <= 0:
        slope, overhead = large / flops[1], min(small, large)
    elif overhead <= 0:
        slope, overhead = large / flops[1], _SMALLEST_OVERHEAD_S
    overhead = max(overhead - elsewhere_s, _SMALLEST_OVERHEAD_S)
    return FamilyRate(1.0 / slope, overhead, _spread([1.0 / value for value in seconds[1]]))


def _rate(operation: Callable[[], object], amount: float, device: str, budget_s: float) -> Rate:
    operation()
    rates = [amount / _window(operation, device, budget_s / _RATE_WINDOWS) for _ in range(_RATE_WINDOWS)]
    return Rate(max(rates), statistics.median(rates), _spread(rates))


def _window(operation: Callable[[], object], device: str, window_s: float) -> float:
    """Seconds per operation, over at least `window_s` of back-to-back work, at least one operation."""
    _finish(device)
    count = 0
    now = time.perf_counter if device.startswith("cuda") else time.thread_time
    began_s, ends = now(), time.perf_counter() + window_s
    while True:
        operation()
        _finish(device)  # each one: a GPU's queue would take far more work than fits in the window
        count += 1
        if time.perf_counter() >= ends:
            return max(now() - began_s, 1e-9) / count


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _spread(values: Sequence[float]) -> float:
    """(p90 - p10) / p50, with the extremes as p90 and p10 where there are few values."""
    ordered = sorted(values)
    low, high = ordered[round(0.1 * (len(ordered) - 1))], ordered[round(0.9 * (len(ordered) - 1))]
    return (high - low) / statistics.median(ordered)


def _stop_if_asked(context: TaskContext) -> None:
    mode = context.channel.stop_requested()
    if mode is not None:
        raise Stopped(mode)
