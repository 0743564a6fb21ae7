"""What the JSON that Keras writes says of a model: its layers by class, input, loss, and what in it is code.

Code is never decoded: a Lambda layer keeps marshalled bytecode, a custom class lives elsewhere. Both are only named.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from coordinator.identify.tensors import MAX_NAME_CHARACTERS, unusable

MAX_CONFIG_BYTES = 32 * 1024 * 1024
_MAX_DEPTH = 32
_MAX_LAYERS = 100_000
_AGAIN = "the file is damaged: save the model again with model.save"
_OWN_MODULES = ("keras", "tf_keras", "keras_nlp", "keras_hub", "keras_cv", "builtins", "tensorflow", "tf")
_CONTAINERS = ("Sequential", "Functional", "Model")
_REGRESSION = (
    "mse",
    "mae",
    "mape",
    "msle",
    "mean_",
    "huber",
    "log_cosh",
    "logcosh",
    "poisson",
    "meansquared",
    "meanabs",
)


@dataclass(slots=True)
class KerasLayer:
    """`layers` of a model that is used as a layer; None for a real layer."""

    name: str
    kind: str
    config: dict[str, Any]
    layers: list[KerasLayer] | None = None

    @property
    def is_trained(self) -> bool:
        return self.config.get("trainable") is not False


@dataclass(slots=True)
class KerasModel:
    kind: str = ""
    layers: list[KerasLayer] = field(default_factory=list)
    input_shape: tuple[int, ...] | None = None
    task: str = ""
    code: list[str] = field(default_factory=list)  # what cannot be told without running code


def parse(text: str | bytes, training: str | None = None) -> KerasModel:
    """The model of a `model_config` or config.json. Raises SpecError for what is none."""
    document = _json(text)
    compiled = _json(training) if training else document.get("compile_config")
    config = document.get("config")
    found = KerasModel(_word(document.get("class_name")))
    listed = config if isinstance(config, list) else config.get("layers") if isinstance(config, dict) else None
    budget = [_MAX_LAYERS]
    found.layers = _layers(listed, 0, budget)
    found.input_shape = _input_shape(document, found.layers)
    found.code = _code(document)
    if listed is None:
        found.code.append(f"the layers of {found.kind or 'the model'}, a class of its own")
    found.task = _task(compiled if isinstance(compiled, dict) else {}, found.layers)
    return found


def _json(text: str | bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise unusable("the configuration of the Keras model is not valid JSON", _AGAIN) from None
    if not isinstance(document, dict):
        raise unusable("the configuration of the Keras model is not a mapping", _AGAIN)
    return document


def _word(value: Any) -> str:
    return value[:MAX_NAME_CHARACTERS] if isinstance(value, str) else ""


def _layers(listed: Any, depth: int, budget: list[int]) -> list[KerasLayer]:
    found = []
    for item in listed if isinstance(listed, list) and depth < _MAX_DEPTH else []:
        budget[0] -= 1
        if budget[0] < 0:
            raise unusable(f"the Keras model lists more than {_MAX_LAYERS} layers", _AGAIN)
        if not isinstance(item, dict):
            continue
        config = item["config"] if isinstance(item.get("config"), dict) else {}
        inner = config.get("layers", item.get("config"))
        kind = _word(item.get("class_name")).rpartition(">")[2]
        below = _layers(inner, depth + 1, budget) if kind in _CONTAINERS and isinstance(inner, list) else None
        found.append(KerasLayer(_word(config.get("name", item.get("name"))), kind, config, below))
    return found


def _input_shape(document: dict[str, Any], layers: list[KerasLayer]) -> tuple[int, ...] | None:
    """Without the batch; None when there are several inputs, or an axis of any length."""
    inputs = [layer.config for layer in layers if layer.kind == "InputLayer"] or [layer.config for layer in layers[:1]]
    build = document.get("build_config")
    shape = inputs[0].get("batch_shape", inputs[0].get("batch_input_shape")) if len(inputs) == 1 else None
    if shape is None and len(inputs) <= 1 and isinstance(build, dict):
        shape = build.get("input_shape")
    if not isinstance(shape, list) or len(shape) > 32:
        return None
    sizes = tuple(shape[1:])
    return sizes if sizes and all(type(size) is int and 0 < size < 2**40 for size in sizes) else None


def _code(document: dict[str, Any]) -> list[str]:
    """Layers and functions that are code, wherever in the configuration they are."""
    found: dict[str, None] = {}
    waiting: list[Any] = [document]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += reversed(item)
        elif isinstance(item, dict):
            kind, module, registered = (_word(item.get(key)) for key in ("class_name", "module", "registered_name"))
            config = item["config"] if isinstance(item.get("config"), dict) else {}
            name = _word(config.get("name"))[:100]
            if kind == "Lambda":
                found[f"layer {name} (Lambda: its code is not decoded)"] = None
            elif ">" in kind or ">" in registered or (module and module.partition(".")[0] not in _OWN_MODULES):
                found[f"layer {name or '?'} ({(registered or kind)[:100]}: a custom class)"] = None
            waiting += reversed(list(item.values()))
        if len(found) > 100:
            break
    return list(found)


def _task(compiled: dict[str, Any], layers: list[KerasLayer]) -> str:
    """classification or regression, from the loss, else from the last layer; "" when it cannot be told."""
    loss = compiled.get("loss")
    if isinstance(loss, dict):
        inner = loss.get("config")
        loss = inner if isinstance(inner, str) else loss.get("class_name")
    name = _word(loss).lower()
    if "crossentropy" in name or "hinge" in name:
        return "classification"
    if name.startswith(_REGRESSION):
        return "regression"
    last = layers[-1] if layers else None
    for _ in range(_MAX_DEPTH):
        if last is None or not last.layers:
            break
        last = last.layers[-1]
    activation = last.config.get("activation") if last is not None else None
    if activation in ("softmax", "sigmoid"):
        return "classification"
    is_one = last is not None and last.kind == "Dense" and last.config.get("units") == 1
    return "regression" if is_one and activation == "linear" else ""


def snake_case(name: str) -> str:
    """As Keras names the groups of weights after classes: MultiHeadAttention -> multi_head_attention."""
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
