"""`--fuzz-seconds N`: how long each parser is fed; short by default, `make fuzz` gives a minute each."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("hive", deadline=None)  # no test is judged by time: machines are busy
settings.load_profile("hive")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=0.5)
    parser.addoption("--fuzz-seed", type=int, default=0)
