"""One calibration for all clusters of a test run, and a cluster of two nodes for tests that heal what others broke."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, cluster


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "calibration"


@pytest.fixture(scope="package")
def two_nodes(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster"), calibration) as made:
        yield made
