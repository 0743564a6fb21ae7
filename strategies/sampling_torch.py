"""The optional hook `sample(model) -> str` in the user's model file: printed once after training.

It shows what a text model has learnt. The trained model is already safe when it is called, so a mistake in it is shown,
never fatal.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from protos.jobspec import ModelSpec, entry_point
from strategies.faults_torch import trimmed_traceback
from strategies.model_torch import load_module


def show_sample(spec: ModelSpec, model: nn.Module, code_dir: Path | None) -> None:
    found = entry_point(spec.source)
    if found is None or code_dir is None:
        return
    hook = getattr(load_module(found[0], code_dir), "sample", None)
    if not callable(hook):
        return
    model.eval()
    try:
        with torch.no_grad():
            sys.stdout.write(f"{hook(model)}\n")
        sys.stdout.flush()
    except Exception as error:
        sys.stderr.write("the model is trained; its sample(model) hook failed:\n")
        sys.stderr.write("\n".join(trimmed_traceback(error, code_dir)) + "\n")
