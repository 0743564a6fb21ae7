"""A model as the pieces between the places where it can be cut, and what any run of pieces needs.

Owns the table that the stage partitioner and the estimates read: for every stage [i, j) of pieces its parameters,
activations, largest output and what crosses its borders. Sizes bytes, per sample where samples matter.
Invariants: stages are of whole pieces; a tied parameter counts on the stage that borrows it, unless that is the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import EllipsisType

import numpy as np
import numpy.typing as npt

from protos.model import ModelProfile, last_of
from protos.plan import Schedule
from strategies.memory import stage_reserve_bytes

Array = npt.NDArray[np.float64]

MOST_SEGMENTS = 32  # a finer cut balances no better than what was measured


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Piece k holds the profile's layers [bounds[k], bounds[k + 1]). Tables: [i, j] of the stage of pieces [i, j)."""

    bounds: tuple[int, ...]
    names: tuple[str, ...]  # the last layer of each piece
    cut_bytes: Array  # [k]: crosses between pieces k - 1 and k, for one sample; 0 at both ends
    crossing_bytes: Array  # what comes in and what goes out together
    parameters: Array
    borrowed: Array  # of them, copies of what an earlier stage holds
    held_bytes: Array  # activations, and in the last stage what the loss keeps
    output_bytes: Array  # the largest output of a layer
    largest: Array  # parameters of the largest layer

    @property
    def count(self) -> int:
        return len(self.names)

    def sums(self, per_layer: Sequence[float]) -> Array:
        """[i, j] of any figure that adds up over layers; meaningless where j < i."""
        return _sums(per_layer, self.bounds)


@dataclass(frozen=True, slots=True)
class Load:
    """How a replica's share of the batch goes through the stages."""

    micro_batches: int
    rows: float  # of one micro-batch
    schedule: Schedule
    parameter_bytes: int  # for each: weight, gradient, optimizer state, bucket

    def held(self, stages_behind: int) -> int:
        """Micro-batches whose activations a stage keeps; `stages_behind` counts itself."""
        if self.schedule is Schedule.GPIPE:
            return self.micro_batches
        return min(self.micro_batches, stages_behind)


def segments_of(profile: ModelProfile, most: int = MOST_SEGMENTS) -> Segments:
    """Of a model with `why_not_cut` == "". Where it has too many cuts, those with the least to send are kept, evenly
    spread over the work."""
    layers = profile.layers
    cuts = _spread(profile, [k for k, layer in enumerate(layers[:-1]) if layer.cut_bytes_per_sample is not None], most)
    bounds = (0, *(cut + 1 for cut in cuts), len(layers))
    cut_bytes = np.array([0.0, *(float(layers[cut].cut_bytes_per_sample or 0.0) for cut in cuts), 0.0])
    borrowed = _sums([layer.borrowed_parameters for layer in layers], bounds)
    borrowed[0, :] = 0.0
    held = _sums([layer.activation_bytes_per_sample for layer in layers], bounds)
    held[:, -1] += max(0.0, profile.peak_activation_bytes_per_sample - profile.activation_bytes_per_sample)
    return Segments(
        bounds=bounds,
        names=tuple(last_of(layers[end - 1].name) for end in bounds[1:]),
        cut_bytes=cut_bytes,
        crossing_bytes=cut_bytes[:, None] + cut_bytes[None, :],
        parameters=_sums([layer.parameters for layer in layers], bounds) + borrowed,
        borrowed=borrowed,
        held_bytes=held,
        output_bytes=_largest([layer.output_bytes_per_sample for layer in layers], bounds),
        largest=_largest([float(layer.parameters) for layer in layers], bounds),
    )


def stage_bytes(
    segments: Segments, load: Load, stages_behind: int, piece: tuple[int, int] | EllipsisType = ...
) -> Array:
    """[i, j], or of one `piece`: memory of a stage with so many stages from it to the end. Between stages the engine
    keeps a buffer for what comes in of every micro-batch, and for every gradient that comes back. Gradients add up over
    micro-batches: the newest of a layer lies beside the sum."""
    fixed = segments.parameters[piece] * load.parameter_bytes + 4 * segments.largest[piece]
    fixed = fixed + stage_reserve_bytes()
    held = segments.held_bytes[piece] * load.held(stages_behind)
    row = held + 2 * segments.output_bytes[piece] + load.micro_batches * segments.crossing_bytes[piece]
    return np.asarray(fixed + row * load.rows)


def _spread(profile: ModelProfile, cuts: list[int], most: int) -> list[int]:
    if len(cuts) < most:
        return cuts
    layers = profile.layers
    weights = [(layer.flops_per_sample, float(layer.parameters), layer.activation_bytes_per_sample) for layer in layers]
    totals = [sum(column) or 1.0 for column in zip(*weights, strict=True)]
    shares = [sum(part / total for part, total in zip(weight, totals, strict=True)) / 3 for weight in weights]
    best: dict[int, int] = {}
    for cut, reached in zip(range(len(layers)), accumulate(shares), strict=True):
        if layers[cut].cut_bytes_per_sample is None or cut == len(layers) - 1:
            continue
        bucket = min(most - 2, int(reached * (most - 1)))
        kept = best.get(bucket)
        if kept is None or (layers[cut].cut_bytes_per_sample or 0.0) < (layers[kept].cut_bytes_per_sample or 0.0):
            best[bucket] = cut
    return sorted(best.values())


def _sums(values: Sequence[float], bounds: Sequence[int]) -> Array:
    prefix = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])[list(bounds)]
    return np.asarray(prefix[None, :] - prefix[:, None])


def _largest(values: Sequence[float], bounds: Sequence[int]) -> Array:
    count = len(bounds) - 1
    pieces = [max(values[a:b], default=0.0) for a, b in pairwise(bounds)]
    table = np.zeros((count + 1, count + 1))
    for start in range(count):
        table[start, start + 1 :] = np.maximum.accumulate(np.array(pieces[start:]))
    return table
