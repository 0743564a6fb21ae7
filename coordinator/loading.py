"""The three lines of plain torch that load a trained model: exact and runnable from anywhere. Pure but for a look."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protos.jobspec import entry_point

MODEL_FILE = "model.safetensors"
CODE_FOLDER = "code"


def load_lines(folder: Path, model: Mapping[str, Any] | None) -> list[str]:
    """For `model` of a job document ({"source", "args"}) fetched into a folder, its code below CODE_FOLDER.

    No lines when the folder has no model; without the code, the middle line is left to the reader.
    """
    path = (folder / MODEL_FILE).resolve()
    if not path.is_file():
        return []
    load = f"safetensors.torch.load_model(model, {str(path)!r})"
    point = entry_point(str((model or {}).get("source", "")))
    if model is None or point is None or not (folder / CODE_FOLDER / point[0]).is_file():
        return ["import safetensors.torch", "model = ...  # the module as your job built it", load]
    source = (folder / CODE_FOLDER / point[0]).resolve()
    root = (folder / CODE_FOLDER).resolve()
    folders = ", ".join(repr(str(each)) for each in dict.fromkeys((source.parent, root)))
    arguments = ", ".join(f"{key}={value!r}" for key, value in (model.get("args") or {}).items())
    return [
        f"import sys, safetensors.torch; sys.path[:0] = [{folders}]",
        f"from {source.stem} import {point[1]}; model = {point[1]}({arguments})",
        load,
    ]
