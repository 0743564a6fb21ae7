"""`--fuzz-seconds N`: how long each parser is fed; short by default, `make fuzz` gives a minute each."""

from __future__ import annotations

import ast
import gc
from typing import Any

import pytest
from hypothesis import settings

_parse = ast.parse


def _parse_undisturbed(*args: Any, **options: Any) -> Any:
    """Python 3.11.7 and before fail where a garbage collection in between formats a traceback, which parses, too
    (python/cpython#106905). Hypothesis reads the source of every test."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _parse(*args, **options)
    finally:
        if collecting:
            gc.enable()


ast.parse = _parse_undisturbed
settings.register_profile("hive", deadline=None)  # no test is judged by time: machines are busy
settings.load_profile("hive")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=0.5)
    parser.addoption("--fuzz-seed", type=int, default=0)
