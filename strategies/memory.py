"""What a worker needs of a node's memory, and the largest micro-batch that fits. Sizes bytes.

A plan may use at most SHARE of what a node grants: the rest is fragmentation, the loader and what was not foreseen.
"""

from __future__ import annotations

from protos.capacity import Capacity
from protos.jobspec import OptimizerSpec
from protos.model import ModelProfile
from strategies.blocks import blocks_of

SHARE = 0.85
RESERVE_BYTES = 250 * 1024**2  # torch itself, its threads and its libraries, in a worker that has done nothing yet
GRADIENT_BUCKET_BYTES = 4  # per parameter: what the backward pass makes before it lies in the buckets

# What a first step brings along whatever the model, measured with one of 13,000 parameters: code that torch loads when
# it is first used, stacks and arenas of autograd's and gloo's threads, the tracer with its graph, FSDP2 and DTensor.
FIRST_STEP_BYTES = 28 * 10**6
GROUP_BYTES = 5 * 10**6
STAGE_BYTES = 30 * 10**6
SHARD_BYTES = 12 * 10**6
PACKED_BYTES = 20 * 10**6  # at most: weights as the kernels' libraries pack them, kept between calls

_STATE_BYTES = {"adam": 8, "adamw": 8, "rmsprop": 4, "adagrad": 4, "sgd": 0}


def bytes_per_parameter(optimizer: OptimizerSpec) -> int:
    """fp32 weights and gradients are 8 B; Adam adds 8 (16 in all), SGD with momentum 4 (12), plain SGD nothing (8)."""
    extra = optimizer.model_extra or {}
    momentum = 4 if optimizer.name in ("sgd", "rmsprop") and extra.get("momentum") else 0
    amsgrad = 4 if optimizer.name in ("adam", "adamw") and extra.get("amsgrad") else 0
    return 8 + _STATE_BYTES.get(optimizer.name, 8) + momentum + amsgrad


def budget_bytes(capacity: Capacity) -> float:
    """What a plan may use: of the first granted GPU when there is one, else of the granted main memory."""
    granted = capacity.gpus[0].memory_bytes if capacity.gpus else capacity.memory_bytes
    return SHARE * granted


def fixed_bytes(profile: ModelProfile, optimizer: OptimizerSpec, ranks: int) -> int:
    """Everything that does not grow with the batch. Unknown layers: at least the table's need (MISSION.md K4)."""
    per_parameter = bytes_per_parameter(optimizer) + (GRADIENT_BUCKET_BYTES if ranks > 1 else 0)
    need = profile.parameters * per_parameter + RESERVE_BYTES + FIRST_STEP_BYTES + packed_bytes(profile.parameters)
    need += GROUP_BYTES if ranks > 1 else 0
    if not profile.layers and profile.requirements.source == "table":
        return max(need, profile.requirements.memory_bytes)
    return need


def packed_bytes(parameters: float) -> int:
    return int(min(PACKED_BYTES, 4 * parameters))


def stage_reserve_bytes() -> int:
    """A worker that runs a stage, without its parameters and activations."""
    return RESERVE_BYTES + FIRST_STEP_BYTES + GROUP_BYTES + STAGE_BYTES


def shard_reserve_bytes() -> int:
    """A worker that runs a shard, without its parameters and activations; it keeps no packed weights (heap.py)."""
    return RESERVE_BYTES + FIRST_STEP_BYTES + GROUP_BYTES + SHARD_BYTES


def sample_bytes(profile: ModelProfile) -> float:
    """Saved activations of one sample, and the largest output with its gradient while it is passed back."""
    saved = max(profile.activation_bytes_per_sample, profile.peak_activation_bytes_per_sample)
    return saved + 2 * max((layer.output_bytes_per_sample for layer in profile.layers), default=0.0)


def recomputed_sample_bytes(profile: ModelProfile) -> float:
    """Like sample_bytes, when each block keeps its input only and computes the rest again, one block at a time."""
    blocks, root = blocks_of(profile)
    kept = sum(block.output_bytes for block in blocks) + sum(layer.activation_bytes_per_sample for layer in root)
    loss = max(0.0, profile.peak_activation_bytes_per_sample - profile.activation_bytes_per_sample)
    saved = kept + loss + max((block.activation_bytes for block in blocks), default=0.0)
    return min(sample_bytes(profile), saved + 2 * max((x.output_bytes_per_sample for x in profile.layers), default=0.0))


def worker_bytes(
    profile: ModelProfile, optimizer: OptimizerSpec, micro_batch: int, ranks: int, recompute: bool = False
) -> int:
    per_sample = recomputed_sample_bytes(profile) if recompute else sample_bytes(profile)
    return fixed_bytes(profile, optimizer, ranks) + int(per_sample * micro_batch)


def largest_micro_batch(
    profile: ModelProfile,
    optimizer: OptimizerSpec,
    capacity: Capacity,
    ranks: int,
    wanted: int,
    recompute: bool = False,
) -> int:
    """At most `wanted`; 0 when not even one sample fits."""
    left = budget_bytes(capacity) - fixed_bytes(profile, optimizer, ranks)
    if left < 0:
        return 0
    per_sample = recomputed_sample_bytes(profile) if recompute else sample_bytes(profile)
    return wanted if per_sample * wanted <= left else int(left // per_sample)
