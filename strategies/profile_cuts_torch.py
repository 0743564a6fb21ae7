"""Where an identified model can be cut into stages: what crosses after each layer, or why it was not examined.

Tracing costs seconds, so it is done only where a plan over several nodes could use it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate

from torch import nn
from torch.export.graph_signature import InputKind

from protos.jobspec import JobSpec, StrategyName
from protos.model import Family, LayerProfile, ModelProfile, TensorCut
from strategies.cut_points_torch import CutPoints, last_module
from strategies.graph_torch import CannotTrace
from strategies.split_torch import Cuttable
from strategies.tensor_cut_torch import tensor_cuts

TENSOR_RANKS = (2, 3, 4, 6, 8, 12, 16)
TENSOR_FAMILIES = (Family.TRANSFORMER, Family.MLP, Family.LINEAR)
EXAMINED_PARAMETERS = 1_000_000  # a smaller model is not worth parting unless the job asks for it
_PARTED = (StrategyName.PIPELINE_PARALLEL, StrategyName.MODEL_PARALLEL)


def why_not_examined(spec: JobSpec, parameters: int) -> str:
    """ "" when the model is to be traced."""
    if spec.strategy in _PARTED:
        return ""
    if spec.strategy != "auto":
        return f"it was not examined: the strategy is {spec.strategy}"
    if spec.nodes.max == 1:
        return "it was not examined: nodes.max is 1"
    if spec.train.batch_size == 1:
        return "it was not examined: train.batch_size is 1"
    if parameters < EXAMINED_PARAMETERS:
        return f"it was not examined: a model of {parameters} parameters is small"
    return ""


def with_cuts(
    layers: tuple[LayerProfile, ...], spec: JobSpec, parameters: int, trace: Callable[[], Cuttable]
) -> tuple[tuple[LayerProfile, ...], str]:
    """The layers with `cut_bytes_per_sample` and `borrowed_parameters`, and why the model cannot be cut or ""."""
    why = why_not_examined(spec, parameters)
    if why:
        return layers, why
    try:
        return described(layers, trace().training)
    except CannotTrace as error:
        return layers, error.message


def with_tensor(
    spec: JobSpec,
    profile: ModelProfile,
    model: nn.Module,
    layers: tuple[LayerProfile, ...],
    wanted_bytes: Mapping[str, float],
) -> tuple[tuple[TensorCut, ...], str]:
    """How single layers can be cut (tensor parallel), for each number of ranks, and why not at all or ""."""
    if why := why_not_examined(spec, profile.parameters):
        return (), why
    if profile.family not in TENSOR_FAMILIES:
        return (), f"it is for transformers and perceptrons, this is a {profile.family.value} model"
    return tensor_cuts(model, TENSOR_RANKS, layers, wanted_bytes)


def described(layers: tuple[LayerProfile, ...], points: CutPoints) -> tuple[tuple[LayerProfile, ...], str]:
    """The layers with what crosses after each, and why the model cannot be cut ("" when it can somewhere).

    Of several layers in one gap the last is where the cut is named: what lies left of it are the layers up to there.
    """
    names = [last_module(layer.name) for layer in layers]
    inner = _not_containers(names)
    gaps = {number: gap for number in inner if (gap := points.gap_after(names[number])) is not None}
    possible = {
        number: points.places[gap] for number, gap in _in_sequence(gaps).items() if 0 <= gap < len(points.places)
    }
    borrowed = _borrowed(names, inner, points)
    filled = []
    for number, layer in enumerate(layers):
        place = possible.get(number)
        crossing = place.bytes_per_sample if place is not None and not place.why_not else None
        filled.append(
            replace(layer, cut_bytes_per_sample=crossing, borrowed_parameters=sum(borrowed.get(number, {}).values()))
        )
    if any(layer.cut_bytes_per_sample is not None for layer in filled):
        return tuple(filled), ""
    why = next((place.why_not for place in possible.values()), "no layer with parameters follows another")
    return tuple(filled), why


def _not_containers(names: list[str]) -> list[int]:
    """Layers in which no other layer lies: those have one place in the order."""
    parents = {name[:end] for name in names for end, letter in enumerate(name) if letter == "."}
    return [number for number, name in enumerate(names) if name not in parents]


def _in_sequence(gaps: Mapping[int, int]) -> dict[int, int]:
    """Layers with no earlier one in a later gap and no later one in the same gap or an earlier one."""
    numbers = sorted(gaps)
    fewest_after = list(accumulate((gaps[number] for number in reversed(numbers)), min))[::-1]
    found = {}
    most_before = -1
    for place, number in enumerate(numbers):
        most_before = max(most_before, gaps[number])
        after = fewest_after[place + 1] if place + 1 < len(numbers) else len(gaps) + most_before + 1
        if gaps[number] == most_before and after > gaps[number]:
            found[number] = gaps[number]
    return found


def _borrowed(names: list[str], inner: list[int], points: CutPoints) -> dict[int, dict[str, int]]:
    """Parameters that a layer uses and an earlier one already used: their elements, by layer and name."""
    ends = sorted(
        (points.traced.calls[names[number]][1], number) for number in inner if names[number] in points.traced.calls
    )
    owner: dict[str, int] = {}
    borrowed: dict[int, dict[str, int]] = {}
    for use in points.uses:
        after = bisect_left(ends, (use, -1))
        layer = ends[after][1] if after < len(ends) else len(names) - 1
        for value in points.traced.order[use].all_input_nodes:
            held = points.traced.held.get(value)
            if held is not None and held.kind is InputKind.PARAMETER and owner.setdefault(held.name, layer) != layer:
                borrowed.setdefault(layer, {})[held.name] = held.elements
    return borrowed
