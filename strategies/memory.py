"""What a worker needs of a node's memory, and the largest micro-batch that fits. Sizes bytes.

A plan may use at most SHARE of what a node grants: the rest is fragmentation, the loader and what was not foreseen.
"""

from __future__ import annotations

from protos.capacity import Capacity
from protos.jobspec import OptimizerSpec
from protos.model import ModelProfile
from protos.plan import NodeView
from strategies.blocks import blocks_of

SHARE = 0.85
RESERVE_BYTES = 250 * 1024**2  # torch itself, its threads and its libraries, in a worker that has done nothing yet
GRADIENT_BYTES = 4  # per parameter: what the backward pass makes
HELD_TIMES = 1.25  # of activations: what the allocator holds between pieces of unlike size

# What a first step brings along whatever the model, measured with one of 13,000 parameters: code that torch loads when
# it is first used, stacks and arenas of autograd's and gloo's threads, the tracer with its graph, FSDP2 and DTensor.
FIRST_STEP_BYTES = 38 * 10**6
GROUP_BYTES = 5 * 10**6
STAGE_BYTES = 30 * 10**6
SHARD_BYTES = 12 * 10**6

_STATE_BYTES = {"adam": 8, "adamw": 8, "rmsprop": 4, "adagrad": 4, "sgd": 0}


def bytes_per_parameter(optimizer: OptimizerSpec) -> int:
    """fp32 weights and gradients are 8 B; Adam adds 8 (16 in all), SGD with momentum 4 (12), plain SGD nothing (8)."""
    extra = optimizer.model_extra or {}
    momentum = 4 if optimizer.name in ("sgd", "rmsprop") and extra.get("momentum") else 0
    amsgrad = 4 if optimizer.name in ("adam", "adamw") and extra.get("amsgrad") else 0
    return 8 + _STATE_BYTES.get(optimizer.name, 8) + momentum + amsgrad


def granted_bytes(capacity: Capacity) -> int:
    """Of the first granted GPU when there is one, else of the main memory."""
    return capacity.gpus[0].memory_bytes if capacity.gpus else capacity.memory_bytes


def budget_bytes(node: NodeView) -> float:
    """What predictions for a plan may add up to there. Where more was needed than predicted, so much less beyond the
    reserve, which is always the same."""
    budget = SHARE * granted_bytes(node.capacity)
    return min(budget, RESERVE_BYTES + (budget - RESERVE_BYTES) / node.memory_factor)


def expected_bytes(predicted: int, workers: int, factor: float) -> int:
    """A prediction of `workers` that share a memory, as it turned out for such models."""
    reserve = workers * RESERVE_BYTES
    return int(reserve + factor * (predicted - reserve)) if predicted > reserve else predicted


def worker_bytes(
    profile: ModelProfile,
    optimizer: OptimizerSpec,
    micro_batch: int,
    ranks: int,
    recompute: bool = False,
    micro_batches: int = 1,
) -> int:
    """At the fullest moment of a step. Activations go while gradients come, and one batch at once has none before: so
    the larger of the two counts. Gradients are there all the time where micro-batches add them up or, in a group, lie
    in buckets that the next ones are added to. Unknown layers: at least the table's need (MISSION.md K4)."""
    activations = HELD_TIMES * _per_sample(profile, recompute) * micro_batch
    return int(_fixed_bytes(profile, optimizer, ranks) + _passing_bytes(profile, activations, ranks, micro_batches))


def _per_sample(profile: ModelProfile, recompute: bool) -> float:
    return recomputed_sample_bytes(profile) if recompute else sample_bytes(profile)


def _fixed_bytes(profile: ModelProfile, optimizer: OptimizerSpec, ranks: int) -> float:
    """Everything but gradients and activations."""
    need = profile.parameters * (bytes_per_parameter(optimizer) - GRADIENT_BYTES) + RESERVE_BYTES + FIRST_STEP_BYTES
    need += GROUP_BYTES if ranks > 1 else 0
    if not profile.layers and profile.requirements.source == "table":
        return max(need, profile.requirements.memory_bytes)
    return need


def _passing_bytes(profile: ModelProfile, activations: float, ranks: int, micro_batches: int) -> float:
    gradients = GRADIENT_BYTES * profile.parameters
    if ranks > 1:
        return gradients + max(activations, gradients)
    return gradients + activations if micro_batches > 1 else max(activations, gradients)


def stage_reserve_bytes() -> int:
    """A worker that runs a stage, without its parameters and activations."""
    return RESERVE_BYTES + FIRST_STEP_BYTES + GROUP_BYTES + STAGE_BYTES


def shard_reserve_bytes() -> int:
    """A worker that runs a shard, without its parameters and activations."""
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


def largest_micro_batch(
    profile: ModelProfile,
    optimizer: OptimizerSpec,
    node: NodeView,
    ranks: int,
    wanted: int,
    recompute: bool = False,
) -> int:
    """At most `wanted`; 0 when not even one sample fits."""
    budget = budget_bytes(node)
    if worker_bytes(profile, optimizer, wanted, ranks, recompute) <= budget:
        return wanted
    gradients = GRADIENT_BYTES * profile.parameters
    left = budget - _fixed_bytes(profile, optimizer, ranks) - gradients
    if left < (gradients if ranks > 1 else 0):
        return 0
    return min(wanted, int(left // max(HELD_TIMES * _per_sample(profile, recompute), 1e-9)))
