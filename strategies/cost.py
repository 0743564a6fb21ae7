"""Closed forms of what training costs. Times s, sizes bytes, rates per second; FLOPs of a sample are forward FLOPs.

Plain arithmetic over a model's profile and a node's measured rates; chooses nothing. COST_MODEL_VERSION changes with
every change of a prediction: what was learned beside one version is not applied to another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from protos.capacity import Capacity, FamilyRate
from protos.jobspec import TrainSpec
from protos.model import LayerProfile, ModelProfile
from protos.plan import DataProfile
from strategies.memory import bytes_per_parameter

COST_MODEL_VERSION = 7

TRAINING_FACTOR = 3.0  # forward, gradient of the inputs, gradient of the weights
RECOMPUTE_FACTOR = 4.0 / 3.0  # of the compute: the forward pass a second time
OVERLAP = 1.5  # g of `mix`, before it is learned
TINY_FLOPS_PER_SAMPLE = 2e4  # below, kernels never reach their sustained rate: the "tiny" family was measured there
STARTUP_S = 0.03  # of a whole core: a fork of the warm worker, the data opened, the model looked at
BUILD_S_PER_PARAMETER = 8e-9  # of a whole core: initial values are drawn
TRACE_S, TRACE_LAYER_S = 0.3, 0.022  # of a whole core: torch.export of a model that is to be cut
GROUP_S = 0.08  # rendezvous and process group of two
GROUP_PER_RANK_S = 0.03
CODEC_BYTES_PER_S = 2e9  # fp32 to fp16 or back, one thread
FP16_PENALTY = 0.01  # of the compute time, for what rounding the gradients may cost in convergence
EVALUATION_FACTOR = 1.0  # forward only
COLLECTIVE_S = 2e-4  # of any collective on a whole core: handed to gloo's threads and back
GROUP_STEP_S = 1e-4  # the same for what a group of whole models does in a step: hooks, buckets, who is in
RING_RANK_S, GATHERED_RANK_S = 5e-4, 3e-4  # the same for each rank of the collective of such a step
GATHERED_BYTES, GATHERED_MORE_BYTES = 256 * 1024, 32 * 1024
PASS_BYTES = 12  # per parameter and pass, whatever its rows: weight read forward and backward, gradient written
KEPT_S = 0.05  # how long what a cap allows and nobody used is kept: half of the kernel's period of 0.1 s on average
KEPT_BY_DUTY_S = 0.25  # the same where workers are stopped and continued (node/duty_cycle.py)
CALIBRATED_LAYERS = {"matmul": 5, "conv": 7, "rnn": 2, "embedding": 3, "tiny": 3}  # of strategies/calibrate_torch.py

_UNMEASURED_FLOPS_PER_CORE = 4e9
_UNMEASURED_OVERHEAD_S = 0.001
_UNMEASURED_MEMORY_BYTES_PER_S = 8e9


@dataclass(frozen=True, slots=True)
class Speed:
    """One node on one model: a step of m micro-batches and b samples computes m * overhead_s + seconds_per_sample * b,
    then updates the weights in optimizer_s."""

    overhead_s: float
    seconds_per_sample: float
    optimizer_s: float

    def compute_s(self, samples: int, micro_batches: int = 1) -> float:
        return micro_batches * self.overhead_s + self.seconds_per_sample * samples

    @property
    def recomputing(self) -> Speed:
        return replace(self, seconds_per_sample=RECOMPUTE_FACTOR * self.seconds_per_sample)

    def step_s(self, samples: int, micro_batches: int = 1) -> float:
        """a_i + 3 f b_i / F_i, where a_i holds the optimizer."""
        return self.compute_s(samples, micro_batches) + self.optimizer_s


def layer_family(layer: LayerProfile) -> str:
    """Which measured rate a layer runs at."""
    return _family_of_kind(layer.kind)


@lru_cache(maxsize=256)
def _family_of_kind(kind: str) -> str:
    kind = kind.lower()
    if "conv" in kind:
        return "conv"
    if any(name in kind for name in ("lstm", "gru", "rnn")):
        return "rnn"
    return "embedding" if "embedding" in kind else "matmul"


def family_flops(profile: ModelProfile) -> Mapping[str, float]:
    """Forward FLOPs of one sample per family. Without layers: two per parameter, as if each were used once."""
    total = profile.flops_per_sample or 2.0 * profile.parameters
    if total < TINY_FLOPS_PER_SAMPLE:
        return {"tiny": total}
    if not profile.flops_per_sample:
        return {"matmul": total}
    flops: dict[str, float] = {}
    for layer in profile.layers:
        family = layer_family(layer)
        flops[family] = flops.get(family, 0.0) + layer.flops_per_sample
    return flops


def family_rate(capacity: Capacity, family: str) -> FamilyRate:
    """The measured rate; else that of matrix products; else what the cores suggest."""
    for name in (family, "matmul"):
        if (rate := capacity.families.get(name)) is not None and rate.flops > 0:
            return rate
    if (measured := next(iter(capacity.flops.values()), None)) is not None and measured.p50 > 0:
        return FamilyRate(measured.p50 / 2, _UNMEASURED_OVERHEAD_S)
    return FamilyRate(max(capacity.cores, 0.1) * _UNMEASURED_FLOPS_PER_CORE, _UNMEASURED_OVERHEAD_S)


def speed(profile: ModelProfile, capacity: Capacity, train: TrainSpec) -> Speed:
    """3 f / F summed over the families. The overhead of a pass is what was measured for the family that takes most of
    the time, for each layer beyond those that were measured as much again, and the weights that have to be read."""
    parts = {
        family: (TRAINING_FACTOR * flops / (rate := family_rate(capacity, family)).flops, rate.overhead_s)
        for family, flops in family_flops(profile).items()
    }
    family = max(parts, key=lambda name: parts[name])
    overhead_s = parts[family][1] * max(1.0, len(profile.layers) / CALIBRATED_LAYERS[family])
    total = sum(part for part, _ in parts.values())
    overhead_s += weights_s(PASS_BYTES, profile.parameters, capacity)
    return Speed(overhead_s, max(total, 1e-12), optimizer_s(profile.parameters, capacity, train))


def layer_seconds(profile: ModelProfile, capacity: Capacity) -> tuple[float, ...]:
    """Training time of one sample in each layer; adds up to the `seconds_per_sample` of `speed`."""
    total = profile.flops_per_sample
    flops = [layer.flops_per_sample if total else 2.0 * layer.parameters for layer in profile.layers]
    tiny = sum(flops) < TINY_FLOPS_PER_SAMPLE
    return tuple(
        TRAINING_FACTOR * count / family_rate(capacity, "tiny" if tiny else layer_family(layer)).flops
        for layer, count in zip(profile.layers, flops, strict=True)
    )


def layer_passes(profile: ModelProfile, capacity: Capacity) -> tuple[float, ...]:
    """Of each layer: what one micro-batch costs in it whatever its rows. Its gradient is added to what others left."""
    adding = PASS_BYTES + 12  # both are read, the sum is written
    return tuple(
        family_rate(capacity, family).overhead_s / CALIBRATED_LAYERS[family]
        + weights_s(adding, layer.parameters, capacity)
        for layer in profile.layers
        for family in (layer_family(layer),)
    )


def weights_s(bytes_each: float, parameters: float, capacity: Capacity) -> float:
    bandwidth = capacity.memory_bandwidth.p50 if capacity.memory_bandwidth else _UNMEASURED_MEMORY_BYTES_PER_S
    return bytes_each * parameters / max(bandwidth, 1.0)


def stretched_s(seconds: float, capacity: Capacity) -> float:
    """What takes one thread so long on a whole core: below a whole core the cap makes it wait for the rest."""
    return seconds / core_share(capacity)


def core_share(capacity: Capacity) -> float:
    """Of one core, 0..1."""
    return min(1.0, max(capacity.cores, 0.01))


def burst_share(capacity: Capacity) -> float:
    """Of its full speed, what a worker that never waits has of it: below 1 where its threads could use more."""
    threads = max(1, round(capacity.cores))
    return 1.0 if capacity.gpus else min(1.0, max(capacity.cores, 0.01) / threads)


def kept_s(capacity: Capacity) -> float:
    return KEPT_BY_DUTY_S if capacity.cpu_mechanism == "duty_cycle" else KEPT_S


def in_group_s(
    compute_s: float, network_s: float, carrying_s: float, capacity: Capacity, overlap: float = OVERLAP, waits: int = 1
) -> float:
    """A step of a rank that computes and waits for others.

    `compute_s` is under its cap, as if it never waited. What it may use and does not use while it waits, it uses
    afterwards: it then computes at up to full speed. But that is kept for a moment only (`kept_s`), at each of its
    `waits`. In the long run it gets no more than its cap: computing and carrying messages together take
    so much in any case.
    """
    spared_s = min(network_s, waits * kept_s(capacity))
    burst_s = max(burst_share(capacity) * compute_s, compute_s - spared_s)
    return max(compute_s + carrying_s, mix(burst_s, network_s, overlap))


def optimizer_s(parameters: float, capacity: Capacity, train: TrainSpec) -> float:
    """Adam reads weights, gradients and both moments and writes three of them: the optimizer moves its state twice less
    one gradient."""
    return weights_s(2 * bytes_per_parameter(train.optimizer) - 4, parameters, capacity)


def mix(compute_s: float, network_s: float, overlap: float = OVERLAP) -> float:
    """(c^g + n^g)^(1/g): g = 1 is one after the other, a large g full overlap (Pollux, OSDI'21, eq. 11)."""
    longest = max(compute_s, network_s)
    if longest <= 0:
        return 0.0
    return float(longest * ((compute_s / longest) ** overlap + (network_s / longest) ** overlap) ** (1 / overlap))


def all_reduce_s(ranks: int, volume_bytes: float, rtt_s: float, bytes_per_s: float, *, gpu: bool) -> float:
    """Around a ring; what is gathered goes around once: (n - 1) (alpha + V / beta), alpha = RTT / 2. `gpu`: whether
    every rank has one."""
    if ranks > 1 and not gpu and gathered(ranks, volume_bytes):
        return (ranks - 1) * (rtt_s / 2 + volume_bytes / bytes_per_s)
    return ring_s(ranks, volume_bytes, rtt_s, bytes_per_s)


def ring_s(ranks: int, volume_bytes: float, rtt_s: float, bytes_per_s: float) -> float:
    """AR(n, V) = 2 (n - 1) alpha + 2 (n - 1) / n * V / beta, alpha = RTT / 2 (Patarasuk and Yuan, 2009)."""
    if ranks < 2:
        return 0.0
    return 2 * (ranks - 1) * rtt_s / 2 + 2 * (ranks - 1) / ranks * volume_bytes / bytes_per_s


def all_reduce_bytes(ranks: int, volume_bytes: float, *, gpu: bool) -> float:
    """Over all links together: every rank sends 2 (n - 1) / n of the volume around a ring; of what is gathered each
    sends the whole to all others."""
    each = ranks if not gpu and gathered(ranks, volume_bytes) else 2
    return each * (ranks - 1) * volume_bytes


def gathered(ranks: int, size_bytes: float) -> bool:
    """Whether a sum over CPUs is quicker when each rank gets what all have and adds it up: half the rounds of a ring.
    That sends more when there are more than two, so only what is small. GPUs sum everything around a ring."""
    more_bytes = (ranks - 1) * (1 - 2 / ranks) * size_bytes
    return size_bytes <= GATHERED_BYTES and more_bytes <= GATHERED_MORE_BYTES


def group_step_s(ranks: int, volume_bytes: float, capacity: Capacity, *, gpu: bool) -> float:
    """Of a node's own time in each step of a group of whole models, beside computing and carrying."""
    rank_s = GATHERED_RANK_S if not gpu and gathered(ranks, volume_bytes) else RING_RANK_S
    return stretched_s(GROUP_STEP_S + (2 if gpu else ranks) * rank_s, capacity)


def fp16_codec_s(volume_bytes: float) -> float:
    """Compress and decompress a volume given in fp32 bytes."""
    return 2 * volume_bytes / CODEC_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class Sync:
    """Gradient exchange of one step: on the wire, in the codec, and the bytes over all links."""

    compression: str
    network_s: float
    codec_s: float
    bytes: float


def synchronise(
    ranks: int, parameters: int, compute_s: float, rtt_s: float, bytes_per_s: float, compression: str, *, gpu: bool
) -> Sync:
    """`auto` takes fp16 only when AR(V) - AR(V/2) > codec time + statistical penalty."""
    volume = 4.0 * parameters
    plain_s = all_reduce_s(ranks, volume, rtt_s, bytes_per_s, gpu=gpu)
    half_s = all_reduce_s(ranks, volume / 2, rtt_s, bytes_per_s, gpu=gpu)
    codec_s = fp16_codec_s(volume)
    pays = plain_s - half_s > codec_s + FP16_PENALTY * compute_s
    if compression == "fp16" or (compression == "auto" and pays):
        return Sync("fp16", half_s, codec_s, all_reduce_bytes(ranks, volume / 2, gpu=gpu))
    return Sync("none", plain_s, 0.0, all_reduce_bytes(ranks, volume, gpu=gpu))


def steps_of(train: TrainSpec, data: DataProfile) -> int | None:
    """Committed steps of the whole job; the last batch of an epoch may be small. None while the rows are unknown."""
    if train.steps is not None:
        return train.steps
    if data.rows is None:
        return None
    return (train.epochs or 1) * math.ceil(data.rows / train.batch_size)


def assumed_rows(profile: ModelProfile, data: DataProfile) -> int:
    """Rows for a prediction while nobody has counted them: as many fp32 inputs as the bytes hold."""
    if data.rows is not None:
        return data.rows
    return max(1, int(data.bytes // (4 * math.prod(profile.input_shape or (256,)) or 1)))


def assumed_steps(profile: ModelProfile, train: TrainSpec, data: DataProfile) -> int:
    known = steps_of(train, data)
    if known is not None:
        return max(known, 1)
    return (train.epochs or 1) * math.ceil(assumed_rows(profile, data) / train.batch_size)


def evaluations(profile: ModelProfile, train: TrainSpec, data: DataProfile) -> int:
    """How often the whole job evaluates."""
    if not data.test_rows or train.evaluate_every == "never":
        return 0
    steps = assumed_steps(profile, train, data)
    per_epoch = max(1, math.ceil(assumed_rows(profile, data) / train.batch_size))
    if train.evaluate_every == "end":
        return 1
    return math.ceil(steps / (per_epoch if train.evaluate_every == "epoch" else train.evaluate_every))


def evaluation_s(
    profile: ModelProfile, train: TrainSpec, data: DataProfile, ranks: Sequence[tuple[Speed, float]]
) -> float:
    """All evaluations of the job, forward only; each rank with its share (0..1) of the rows of the test split."""
    times, rows = evaluations(profile, train, data), data.test_rows or 0
    batches = math.ceil(rows / train.batch_size)
    slowest_s = max(batches * node.overhead_s + share * rows * node.seconds_per_sample for node, share in ranks)
    return times * slowest_s * EVALUATION_FACTOR / TRAINING_FACTOR


def startup_s(profile: ModelProfile, nodes: Sequence[Capacity], *, traced: bool = False) -> float:
    """From the offer to the first step, data apart, one rank on each of `nodes`: workers, the model, the process group
    when there is one. `traced`: every rank finds out where the model can be cut."""
    own_s = STARTUP_S + BUILD_S_PER_PARAMETER * profile.parameters
    if traced:
        own_s += TRACE_S + TRACE_LAYER_S * len(profile.layers)
    group_s = GROUP_S + GROUP_PER_RANK_S * (len(nodes) - 2) if len(nodes) > 1 else 0.0
    return max(stretched_s(own_s, capacity) for capacity in nodes) + group_s
