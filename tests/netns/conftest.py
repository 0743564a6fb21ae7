"""Skips everything here where namespaces are not to be had, and says why; one calibration for all clusters of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.netns.machines import why_not


@pytest.fixture(scope="session", autouse=True)
def namespaces_allowed() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "calibration"
