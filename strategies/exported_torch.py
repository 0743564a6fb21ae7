"""A model without its source: a torch.export file that trains.

Owns reading the file, and the module made of it, whose `train()` and `eval()` set dropout, normalisation and recurrent
layers as they would be set in the source. Refuses files exported for one batch size, and those that hold code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from protos.errors import ErrorCode, SpecError
from strategies.cut_points_torch import CutPoints
from strategies.graph_torch import (
    SINGLE,
    CannotTrace,
    Traced,
    first_line,
    has_rows,
    names_of_one,
    quiet,
    traced_program,
)
from strategies.stage_graph_torch import StageModule, whole


def exported_module(path: Path) -> StageModule:
    """The whole model of a .pt2 file, with its weights, on the CPU. Raises SpecError."""
    program = load_program(path)
    training, evaluation = (CutPoints(trace_file(program, training=mode)) for mode in (True, False))
    traced, device = training.traced, torch.device("cpu")
    constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    held = {one.name: one for mode in (evaluation, training) for one in mode.traced.everything}  # each has constants
    state = {**program.state_dict, **constants}
    module = StageModule(tuple(held.values()), traced.same, state, traced.features, device)
    module.add_mode(whole(training), True, device)
    module.add_mode(whole(evaluation), True, device)
    return module


def trace_file(program: ExportedProgram, *, training: bool, precision: str = "fp32") -> Traced:
    """The graph of a torch.export program, its dropout and normalisation set to the mode. Raises CannotTrace."""
    positional, named = program.call_spec.in_spec.children() if program.call_spec.in_spec is not None else (None, None)
    assert positional is not None and named is not None
    names: tuple[str, ...] = tuple(str(key) for key in named.context) if named.num_children else ()
    if positional.num_children + len(names) != len(program.graph_signature.user_inputs) or not (
        (positional.num_children == 1 and not names) or (names and not positional.num_children)
    ):
        raise CannotTrace(
            "the exported model takes other inputs than one tensor, or tensors by name",
            "export it as torch.export.export(model, (x,), ...) or with kwargs={name: tensor}",
        )
    same = names_of_one(program.state_dict)
    with quiet():
        return traced_program(program, names or (SINGLE,), "", same, training, precision, from_file=True)


def load_program(path: Path) -> ExportedProgram:
    """A .pt2 file. Raises SpecError when it is none, holds code, or was exported for one batch size only."""
    from torch.export.pt2_archive._package import load_pt2  # takes long to import, and few jobs need it

    from strategies.exported_archive_torch import check_archive

    try:
        with quiet():
            check_archive(path)
            program = load_pt2(str(path)).exported_programs["model"]  # not torch.export.load: that falls back to pickle
    except SpecError:
        raise
    except Exception as error:
        raise SpecError(
            f"{path.name} cannot be read as a torch.export program: {first_line(error)}",
            "write it with torch.export.save, under a torch version that is not newer than this one",
            code=ErrorCode.MODEL_UNUSABLE,
        ) from None
    state = program.state_dict
    if not any(isinstance(value, nn.Parameter) and value.requires_grad for value in state.values()):
        raise SpecError(
            f"{path.name} holds no trainable parameters", "export the module that trains", code=ErrorCode.MODEL_UNUSABLE
        )
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for name in program.graph_signature.user_inputs:
        if not isinstance(name, str) or not has_rows(placeholders[name]):
            raise SpecError(
                f"{path.name} was exported for a fixed number of rows",
                'export it with a dynamic batch: dynamic_shapes={"x": {0: torch.export.Dim("batch")}}',
                code=ErrorCode.MODEL_UNUSABLE,
            )
    return program
