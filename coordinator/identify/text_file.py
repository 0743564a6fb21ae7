"""Text that may be a model: Python source with an entry point, or the config.json of a Hugging Face directory.

Source is parsed, never compiled or run.
"""

from __future__ import annotations

import ast
import json
import warnings
from dataclasses import replace
from typing import BinaryIO

from coordinator.identify.first_bytes import unknown
from coordinator.identify.tensors import MAX_NAME_CHARACTERS, WHAT_HIVE_TRAINS, foreign, unusable
from protos.model import ModelProfile
from strategies.hugging_face import check_config

MAX_SOURCE_BYTES = 1024 * 1024
PYTHON_SOURCE = "python_source"
HUGGING_FACE = "hugging_face"
SAFETENSORS_INDEX = "safetensors_index"
_INDEX = "an index of weights in several files, not the weights: name the directory that it lies in with them"


def looks_like(head: bytes, size: int) -> bool:
    """Text in UTF-8, as far as its beginning tells: a character may be cut in two at the end of it."""
    if size > MAX_SOURCE_BYTES or b"\0" in head:
        return False
    try:
        head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and len(head) < size
    return True


def read(file: BinaryIO, size: int) -> ModelProfile:
    """Python source, a configuration, or of format "unknown"; what only starts like one of them is not an error."""
    file.seek(0)
    content = file.read(MAX_SOURCE_BYTES)
    try:
        source = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return unknown(content, size)
    found = configuration(source, size) if source.lstrip().startswith("{") else _python(source, size)
    return found or unknown(content, size)


def configuration(source: str, size: int) -> ModelProfile | None:
    """The config.json of a Hugging Face directory, or the index of its weights: what else such a directory holds is
    found out from the directory.

    None for other text and JSON. Raises SpecError for a configuration that is refused.
    """
    try:
        content = json.loads(source)
    except ValueError:
        return None
    except RecursionError:
        raise unusable("the JSON is nested too deeply") from None
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        return foreign("pytorch", SAFETENSORS_INDEX, size, _INDEX)
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        return None
    check_config(content)
    why_not = "name the directory that it lies in: model: {source: DIRECTORY}; it is identified on a node"
    profile = foreign("pytorch", HUGGING_FACE, size, why_not, architecture=content["model_type"][:MAX_NAME_CHARACTERS])
    return replace(profile, trainable=True)


def _python(source: str, size: int) -> ModelProfile | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the user's escapes and comparisons
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    except (RecursionError, MemoryError):  # what ast says of source that is nested too deeply
        raise unusable("the text is nested too deeply to be Python source") from None
    if all(isinstance(node, ast.Expr) for node in tree.body):
        return None  # a word, a number or a tuple of them is an expression, too
    functions = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    profile = foreign("pytorch", PYTHON_SOURCE, size, "")
    if not functions:
        return replace(profile, why_not=f"the Python file defines no function or class. {WHAT_HIVE_TRAINS}")
    why_not = f"name the function that builds the model, e.g. FILE.py:{functions[0]}; it is identified on a node"
    return replace(profile, trainable=True, why_not=why_not)
