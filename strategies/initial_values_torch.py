"""A rank's own boxes of a model's initial values: the model is built in files on disk, and only the boxes are read.

Invariant: beside the boxes, memory holds at most one tensor of the weights that the job starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from protos.jobspec import JobSpec
from strategies.context import Workspace
from strategies.extent import Extent
from strategies.hollow_model_torch import model_file, named_tensors
from strategies.model_torch import build
from strategies.part_torch import file_backed
from strategies.weights_torch import Weights, fitting, open_weights


def initial_parts(spec: JobSpec, workspace: Workspace, extents: Mapping[str, Extent]) -> dict[str, Tensor]:
    """For each name of the state dict its box, on the CPU. Raises what building raises, Exhausted for a full disk."""
    scratch, whole_model = workspace.output_dir, model_file(spec.model, workspace.weights_path)
    with file_backed(scratch):
        model = build(spec.model, workspace.code_dir, whole_model, spec.train.seed)
    built = named_tensors(model).tensors
    parts: dict[str, Tensor] = {}
    with ExitStack() as files, torch.no_grad():
        weights: Weights | None = None
        source: Mapping[str, str] = {}
        if workspace.weights_path is not None and whole_model is None:
            weights = files.enter_context(open_weights(workspace.weights_path))
            source = fitting(model, weights, workspace.weights_path.name)
        for name, extent in extents.items():
            parts[name] = torch.empty(extent.size, dtype=built[name].dtype)
            if parts[name].numel():
                whole = weights[source[name]] if weights is not None and name in source else built[name]
                with file_backed(scratch):  # what is read of a file leaves memory again
                    parts[name].copy_(whole.detach()[extent.inside(Extent.whole(extent.shape))])
    return parts
