"""Cuts a model into pipeline stages: from the user's module or .pt2 file to one nn.Module per stage.

    cuttable = trace_job(spec, code_dir, features)          # fake tensors: no weight is allocated
    stages = cut(cuttable, layout.cut_after)                # one StageSpec per stage, the same on every rank
    mine = stages[layout.stage_of(rank)]
    state = build_part(spec.model, code_dir, weights_path, spec.train.seed, mine.names)
    module = stage_module(mine, state, device)              # module.train() / module.eval() choose the graph

Invariants: names are those of the whole model's state dict; a tensor used by two stages is held by both under the same
names; the stages one after the other compute what the model does, for any number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from protos.errors import ErrorCode, HiveError, SpecError
from protos.jobspec import JobSpec
from strategies import model_torch
from strategies.cut_points_torch import Crossing, CutPoints, last_module
from strategies.exported_torch import load_program, trace_file
from strategies.graph_torch import CannotTrace, Features, Held, Traced, quiet, trace_graph
from strategies.part_torch import build_part, file_backed
from strategies.stage_graph_torch import Piece, StageModule

__all__ = [
    "CannotTrace",
    "Crossing",
    "Cuttable",
    "StageSpec",
    "build_part",
    "cut",
    "stage_module",
    "tied",
    "trace_exported",
    "trace_graph",
    "trace_job",
    "trace_model",
]


@dataclass(frozen=True, slots=True)
class Cuttable:
    """A model traced for training and for evaluation."""

    training: CutPoints
    evaluation: CutPoints

    @property
    def traced(self) -> Traced:
        return self.training.traced


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage: what it holds, and what comes in and goes out.

    `inputs` of the first stage are the model's features in the order of `features`; `outputs` of the last stage is
    empty: it returns the logits, as the loss expects them, not a tuple.
    """

    index: int
    count: int
    features: tuple[str, ...]  # names of the model's inputs: ("features",) when it takes one tensor
    held: tuple[Held, ...]
    same: Mapping[str, tuple[str, ...]]
    training: Piece
    evaluation: Piece

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters, buffers and constants held, in the order of the model: give them to build_part."""
        return tuple(one.name for one in self.held if one.value is None)

    @property
    def bytes(self) -> int:
        """Of all that is held."""
        return sum(one.elements * one.dtype.itemsize for one in self.held)

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    @property
    def inputs(self) -> tuple[Crossing, ...]:
        return self.training.inputs

    @property
    def outputs(self) -> tuple[Crossing, ...]:
        return self.training.outputs

    @property
    def evaluation_inputs(self) -> tuple[Crossing, ...]:
        return self.evaluation.inputs

    @property
    def evaluation_outputs(self) -> tuple[Crossing, ...]:
        return self.evaluation.outputs


def trace_job(spec: JobSpec, code_dir: Path | None, features: Features, weights_path: Path | None = None) -> Cuttable:
    """Builds the job's model with fake tensors and traces it.

    `features`: one batch as the model gets it, of any number of rows; `weights_path` is where the model's file lies
    when it is one. Raises CannotTrace (a SpecError) with the first line of why, and what building the model raises.
    """
    precision = spec.train.precision
    file = model_torch.exported_file(spec.model, code_dir, weights_path)
    if file is not None:
        return trace_exported(load_program(file), precision)
    model_torch.prepare(spec.model, code_dir, weights_path)
    return trace_model(_weightless(spec, code_dir, weights_path), features, precision)


def _weightless(spec: JobSpec, code_dir: Path | None, weights_path: Path | None) -> nn.Module:
    """The model without memory for its weights: of fake tensors, or in files where building it looks at values."""
    try:
        with quiet(), FakeTensorMode(allow_non_fake_inputs=True):
            return model_torch.build_unloaded(spec.model, code_dir, weights_path, spec.train.seed)
    except HiveError:
        raise
    except Exception:
        with file_backed():
            return model_torch.build_unloaded(spec.model, code_dir, weights_path, spec.train.seed)


def trace_model(model: nn.Module, features: Features, precision: str = "fp32") -> Cuttable:
    """As trace_job, of a module that is there, of fake tensors or real ones."""
    training = trace_graph(model, features, training=True, precision=precision)
    evaluation = trace_graph(model, features, training=False, precision=precision)
    return _cuttable(training, evaluation)


def trace_exported(program: ExportedProgram, precision: str = "fp32") -> Cuttable:
    """As trace_job, of a torch.export program."""
    training, evaluation = (trace_file(program, training=mode, precision=precision) for mode in (True, False))
    return _cuttable(training, evaluation)


def _cuttable(training: Traced, evaluation: Traced) -> Cuttable:
    points = CutPoints(training)
    return Cuttable(points, CutPoints(evaluation, points.written_names))


def cut(model: Cuttable, cut_after: Sequence[str]) -> tuple[StageSpec, ...]:
    """len(cut_after) + 1 stages, cut after the layers of these names (in the order of the model).

    Every name of the model's state dict is in at least one stage. Raises SpecError where it cannot be cut, with why.
    """
    training = _positions(model.training, cut_after)
    evaluation = _same_places(model, training)
    pieces = [
        (before, after)
        for before, after in zip(_pieces(model.training, training), _pieces(model.evaluation, evaluation), strict=True)
    ]
    held = _shares(model, pieces)
    traced = model.traced
    return tuple(
        StageSpec(index, len(pieces), traced.features, held[index], traced.same, *both)
        for index, both in enumerate(pieces)
    )


def _positions(points: CutPoints, cut_after: Sequence[str]) -> list[int]:
    positions: list[int] = []
    for name in cut_after:
        gap = points.gap_after(last_module(name))
        if gap is None or not 0 <= gap < len(points.places):
            what = "is not a layer of the traced model" if gap is None else "has no layer with parameters after it"
            raise _refused(name, what)
        place = points.places[gap]
        if place.why_not:
            raise _refused(name, place.why_not)
        if positions and place.position <= positions[-1]:
            raise _refused(name, "it does not come after the cut before it")
        positions.append(place.position)
    return positions


def _refused(name: str, why: str) -> SpecError:
    return SpecError(
        f"the model cannot be cut after {name}: {why}",
        "cut after another layer: `hive plan` shows those that can be",
        code=ErrorCode.MODEL_UNUSABLE,
    )


def _same_places(model: Cuttable, positions: Sequence[int]) -> list[int]:
    """In the graph of evaluation: the gaps that part the same parameters."""
    first_training, first_evaluation = model.training.first_uses(), model.evaluation.first_uses()
    found: list[int] = []
    for position in positions:
        left = {name for name, use in first_training.items() if model.training.uses[use] < position}
        uses = [use for name, use in first_evaluation.items() if name in left]
        gap = max(uses, default=-1)
        mixed = [n for n, use in first_evaluation.items() if use <= gap and n in first_training and n not in left]
        places = model.evaluation.places
        if mixed or not 0 <= gap < len(places):
            raise _refused(sorted(left)[-1] if left else "its first layer", "layers run in another order in evaluation")
        if places[gap].why_not:
            raise _refused(sorted(left)[-1], f"in evaluation {places[gap].why_not}")
        found.append(places[gap].position)
    return found


def _pieces(points: CutPoints, positions: Sequence[int]) -> list[Piece]:
    traced = points.traced
    bounds = [0, *positions, len(traced.order)]
    sent = [traced.inputs, *(points.sweep[position].crossing for position in positions)]
    crossings = [
        tuple(points.crossing_of(node, position) for node in nodes)
        for nodes, position in zip(sent, bounds, strict=False)
    ]
    return [
        Piece(
            points=points,
            start=bounds[index],
            stop=bounds[index + 1],
            incoming=sent[index],
            outgoing=sent[index + 1] if index + 1 < len(sent) else (traced.output,),
            inputs=crossings[index],
            outputs=crossings[index + 1] if index + 1 < len(sent) else (),
        )
        for index in range(len(sent))
    ]


def _shares(model: Cuttable, pieces: Sequence[tuple[Piece, Piece]]) -> list[tuple[Held, ...]]:
    """What each stage holds, under all of its names; what no operation uses is held by the first stage."""
    same = model.traced.same
    used = []
    for both in pieces:
        direct = {one.name for piece in both for one in piece.held}
        used.append({other for name in direct for other in same.get(name, (name,))})
    everything = {one.name: one for one in model.evaluation.traced.everything}
    everything |= {one.name: one for one in model.traced.everything}
    used[0] |= set(everything).difference(*used)
    return [tuple(one for name, one in everything.items() if name in names) for names in used]


def tied(stages: Sequence[StageSpec]) -> Mapping[str, tuple[int, ...]]:
    """Parameters held by more than one stage and those stages: their gradients are to be summed over these.

    The name is the one that `named_parameters()` of each of these stages gives.
    """
    holders: dict[str, list[int]] = {}
    for stage in stages:
        for one in stage.held:
            if one.kind is InputKind.PARAMETER and stage.same.get(one.name, (one.name,))[0] == one.name:
                holders.setdefault(one.name, []).append(stage.index)
    return {name: tuple(stages) for name, stages in holders.items() if len(stages) > 1}


def stage_module(stage: StageSpec, state: Mapping[str, Tensor], device: torch.device) -> StageModule:
    """The module of one stage: forward(*inputs) -> tuple of outputs; the last stage returns the logits.

    `state` holds a tensor for each of stage.names; they become the parameters and buffers (moved to `device`), under
    their names in the whole model: `state_dict()` is the stage's part of the model's. `train()` and `eval()` choose the
    graph; both share parameters and buffers. Inputs that cross are given as leaves with requires_grad as declared.
    """
    module = StageModule(stage.held, stage.same, state, stage.features, device)
    module.add_mode(stage.training, stage.is_last, device)
    module.add_mode(stage.evaluation, stage.is_last, device)
    return module
