"""The keyword arguments of torch's optimizers and the kind of value each takes, known without importing torch.

A test compares the names with torch's own signatures.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_NUMBER_TEXT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NUMBER, _FLAG, _CHOICE, _PAIR = "a number", "true or false", "true, false or null", "a list of two numbers"
_EVERY = {"weight_decay": _NUMBER, "maximize": _FLAG, "foreach": _CHOICE, "differentiable": _FLAG}
_ADAM = {
    **_EVERY,
    "betas": _PAIR,
    "eps": _NUMBER,
    "amsgrad": _FLAG,
    "capturable": _FLAG,
    "fused": _CHOICE,
}
KEYWORDS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "sgd": {**_EVERY, "momentum": _NUMBER, "dampening": _NUMBER, "nesterov": _FLAG, "fused": _CHOICE},
        "adam": {**_ADAM, "decoupled_weight_decay": _FLAG},
        "adamw": _ADAM,
        "rmsprop": {
            **_EVERY,
            "alpha": _NUMBER,
            "eps": _NUMBER,
            "momentum": _NUMBER,
            "centered": _FLAG,
            "capturable": _FLAG,
        },
        "adagrad": {
            **_EVERY,
            "lr_decay": _NUMBER,
            "initial_accumulator_value": _NUMBER,
            "eps": _NUMBER,
            "fused": _CHOICE,
        },
    }
)


def problem_of(optimizer: str, options: Mapping[str, Any]) -> str | None:
    """What is wrong with the first wrong one of an optimizer's options, None when torch would take them all."""
    known = KEYWORDS[optimizer]
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, [*known, "lr"], 1)
            meant = f"; did you mean {near[0]!r}?" if near else ";"
            return f"{optimizer} has no key {key!r}{meant} It takes: {', '.join(sorted([*known, 'lr']))}"
        if not _is(known[key], value):
            return f"{key} must be {known[key]}, not {value!r}"
    return None


def number_in(value: Any) -> Any:
    """The number that a text like "1e-3" is, also in a list; anything else as it is."""
    if isinstance(value, list | tuple):
        return [number_in(part) for part in value]
    if not isinstance(value, str) or not _NUMBER_TEXT.fullmatch(value.strip()):
        return value
    return float(value)


def _is(kind: str, value: Any) -> bool:
    if kind == _PAIR:
        return isinstance(value, list | tuple) and len(value) == 2 and all(_is(_NUMBER, part) for part in value)
    if kind == _NUMBER:
        return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
    return isinstance(value, bool) or (value is None and kind == _CHOICE)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False
