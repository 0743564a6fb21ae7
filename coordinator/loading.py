"""The three lines of plain torch that load a trained model: exact and runnable from anywhere. Pure but for a look."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protos.jobspec import entry_point

MODEL_FILE = "model.safetensors"
CODE_FOLDER = "code"
AUTO_CLASSES = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "image_classification": "AutoModelForImageClassification",
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
    "base": "AutoModel",
}


def load_lines(folder: Path, model: Mapping[str, Any] | None) -> list[str]:
    """For `model` of a job document ({"source", "args"}) fetched into a folder, its code below CODE_FOLDER.

    No lines when the folder has no model; without the code, the middle line is left to the reader. A .pt2 file and a
    Hugging Face directory are named as the job names them: they lie where it was submitted from.
    """
    path = (folder / MODEL_FILE).resolve()
    if not path.is_file():
        return []
    load = f"safetensors.torch.load_model(model, {str(path)!r})"
    source_name, given = str((model or {}).get("source", "")), dict((model or {}).get("args") or {})
    if source_name.endswith(".pt2"):
        build = f"model = torch.export.load({source_name!r}).module()  # the file that your job names"
        return ["import safetensors.torch, torch", build, load]
    point = entry_point(source_name)
    if source_name and point is None:
        kind = AUTO_CLASSES.get(str(given.pop("task", "")), "getattr(transformers, config.architectures[0])")
        built = f"transformers.{kind}.from_config(config)" if kind in AUTO_CLASSES.values() else f"{kind}(config)"
        fields = "".join(f", {key}={value!r}" for key, value in given.items())
        config = f"config = transformers.AutoConfig.from_pretrained({source_name!r}{fields})"
        return ["import safetensors.torch, transformers", f"{config}; model = {built}", load]
    if model is None or point is None or not (folder / CODE_FOLDER / point[0]).is_file():
        return ["import safetensors.torch", "model = ...  # the module as your job built it", load]
    source = (folder / CODE_FOLDER / point[0]).resolve()
    root = (folder / CODE_FOLDER).resolve()
    folders = ", ".join(repr(str(each)) for each in dict.fromkeys((source.parent, root)))
    arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return [
        f"import sys, safetensors.torch; sys.path[:0] = [{folders}]",
        f"from {source.stem} import {point[1]}; model = {point[1]}({arguments})",
        load,
    ]
