"""A rank's own boxes of a model's initial values: the model is built in files on disk, and only the boxes are read.

Invariant: beside the boxes, memory holds at most one tensor of the weights that the job starts from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from protos.jobspec import JobSpec
from strategies.context import Workspace
from strategies.extent import Extent
from strategies.hollow_model_torch import named_tensors
from strategies.model_torch import build_unloaded, starting_values
from strategies.part_torch import file_backed


def initial_parts(spec: JobSpec, workspace: Workspace, extents: Mapping[str, Extent]) -> dict[str, Tensor]:
    """For each name of the state dict its box, on the CPU. Raises what building raises, Exhausted for a full disk."""
    scratch, files = workspace.output_dir, (workspace.code_dir, workspace.weights_path)
    with file_backed(scratch):
        model = build_unloaded(spec.model, *files, spec.train.seed)
    built = named_tensors(model).tensors
    parts: dict[str, Tensor] = {}
    with starting_values(spec.model, model, *files) as readers, torch.no_grad():
        for name, extent in extents.items():
            parts[name] = torch.empty(extent.size, dtype=built[name].dtype)
            if parts[name].numel():
                whole = readers[name]() if name in readers else built[name]
                with file_backed(scratch):  # what is read of a file leaves memory again
                    parts[name].copy_(whole.detach()[extent.inside(Extent.whole(extent.shape))])
    return parts
