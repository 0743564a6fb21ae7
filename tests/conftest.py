"""`--fuzz-seconds N`: how long each parser is fed; short by default, `make fuzz` gives a minute each."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=0.5)
    parser.addoption("--fuzz-seed", type=int, default=0)
