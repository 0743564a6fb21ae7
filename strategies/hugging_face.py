"""A model as a Hugging Face directory: which of its files travel, and which configurations are refused.

Owns the names of the files and the rules for config.json; reads no weights, imports nothing of transformers and little
else: the confined reader of strangers' files uses it. Refuses what brings its own code or would fetch some, quantised
models, and weights that are pickles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from protos.errors import ErrorCode, SpecError
from protos.model import Family

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NO_WEIGHTS = "none"  # model.weights of a job that starts from the seed
MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 64 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_SIZE = 2**31 - 1  # of a width, a vocabulary, a length
MAX_COUNT = 16_384  # of layers, heads, experts: each is a module to build
_COUNTED = ("layers", "n_layer", "depth", "blocks", "heads", "n_head", "experts", "stages")
_SIZED = ("size", "dim", "width", "channels", "d_model", "n_embd", "d_ff", "positions", "labels")
_ATTENTIONS = (None, "eager", "sdpa")
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
_FAMILY_OF_TYPE = {"patchtsmixer": Family.MLP}  # whose layers are called attention and only weigh their own input
_TASK_OF_ENDING = {  # of a class of transformers
    "Classification": "classification",
    "ForMultipleChoice": "classification",
    "ForCausalLM": "language_model",
    "LMHeadModel": "language_model",
    "ForMaskedLM": "language_model",
    "ForConditionalGeneration": "language_model",
    "ForSeq2SeqLM": "language_model",
}


def travelling_files(folder: Path, weights: str | None) -> dict[str, Path]:
    """Relative path -> file, of what a node needs; `weights` is model.weights of the job. Raises SpecError for weights
    that are missing or pickled."""
    if weights not in (None, NO_WEIGHTS):
        raise _unusable(
            "model.weights: a Hugging Face directory brings its own weights",
            f"remove it to start from these, or give weights: {NO_WEIGHTS} to start from the seed",
        )
    names = [CONFIG_FILE, *([GENERATION_FILE] if (folder / GENERATION_FILE).is_file() else [])]
    if weights != NO_WEIGHTS:
        names += _weights(folder)
    for name in names:
        if not (folder / name).is_file():
            raise _unusable(f"{folder} has no {name}, which its index names", "fetch the directory again")
    return {name: (folder / name).resolve() for name in names}


def _weights(folder: Path) -> list[str]:
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if index.is_file():
        return [INDEX_FILE, *indexed_files(index)]
    if any(True for pattern in _PICKLES for _ in folder.glob(pattern)):
        raise _unusable(
            f"the weights in {folder} are pickled, and loading a pickle runs code: hive reads safetensors",
            'convert them once where you trust them: python -c "from transformers import AutoModel as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\", with the class of your task",
        )
    raise _unusable(
        f"{folder} holds no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}",
        f"fetch them, or give model.weights: {NO_WEIGHTS} to start from the seed",
    )


def indexed_files(index: Path) -> list[str]:
    """The files that an index names, each once; all lie beside it. Raises SpecError."""
    document = read_json(index, MAX_INDEX_BYTES)
    where = document.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise _unusable(f"{index.name} has no weight_map", "fetch the directory again")
    found = list(dict.fromkeys(where.values()))
    for file in found:
        if not is_beside(file):
            raise _unusable(f"{index.name} names {str(file)[:80]!r}, which is no .safetensors file beside it", "")
    return sorted(found)


def is_beside(file: object) -> bool:
    """Whether an index may name this file."""
    return isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")


def read_json(path: Path, limit_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises SpecError."""
    try:
        if path.stat().st_size > limit_bytes:
            raise _unusable(f"{path.name} is over {limit_bytes} bytes", "is it the right file?")
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        raise _unusable(f"{path.name} is not JSON that can be read", "fetch the directory again") from None
    if not isinstance(document, dict):
        raise _unusable(f"{path.name} does not hold a mapping", "fetch the directory again")
    return document


def check_config(config: Mapping[str, Any]) -> None:
    """Raises SpecError for a configuration that hive does not build, whatever transformers would say."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise _unusable(
            f"{CONFIG_FILE} names no model_type", "it is the config.json that save_pretrained of transformers writes"
        )
    check_sizes(config)
    for key, value in _entries(config):
        if key in _CODE_KEYS and value:
            raise _unusable(
                f"the model brings its own code ({key} in {CONFIG_FILE}), which hive never runs from a configuration",
                f"remove {key} if transformers has {model_type!r} itself, or give a Python function that builds the "
                "model: model.source: FILE.py:FUNCTION",
            )
        if key in _ATTENTION_KEYS and value not in _ATTENTIONS:
            raise _unusable(
                f"{key} {str(value)[:80]!r} of {CONFIG_FILE} would load code from elsewhere", "give sdpa or eager"
            )
        if key == "quantization_config" and value:
            raise _unusable("the model is quantised and cannot be trained", "start from the weights it was made from")


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raises SpecError for a model so large that only building it would exhaust a machine."""
    for key, value in _entries(config):
        numbers = [each for each in (value if isinstance(value, list) else [value]) if type(each) in (int, float)]
        name = str(key).lower()
        limit = MAX_COUNT if any(word in name for word in _COUNTED) else MAX_SIZE
        if (limit is MAX_COUNT or any(word in name for word in _SIZED)) and any(each > limit for each in numbers):
            raise _unusable(
                f"{name[:80]} of {CONFIG_FILE} is over the limit of {limit}", "is it a model's configuration?"
            )


def task_of(config: Mapping[str, Any]) -> str | None:
    """What the first of `architectures` is for, as a profile names it; None where it does not say."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    if not isinstance(first, str):
        return None
    return next((task for ending, task in _TASK_OF_ENDING.items() if ending in first), None)


def family_of_type(model_type: str) -> Family | None:
    """Of a model whose family its layers do not show; None for all others."""
    return _FAMILY_OF_TYPE.get(model_type)


def _entries(document: object) -> Iterator[tuple[str, Any]]:
    """Every key with its value, also those of configurations inside."""
    todo = [document]
    while todo:
        here = todo.pop()
        if isinstance(here, dict):
            yield from here.items()
            todo.extend(here.values())
        elif isinstance(here, list):
            todo.extend(here)


def _unusable(message: str, hint: str) -> SpecError:
    return SpecError(message, hint, code=ErrorCode.MODEL_UNUSABLE)
