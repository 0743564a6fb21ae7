"""What a probe between two machines finds on a link whose rate is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import until
from tests.netns.lan_cluster import LanCluster
from tests.netns.machines import SUBNET, lan

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(180)]


MEASUREMENTS = 3  # at most: a machine that has other things to do measures less than the link carries, never more


def test_a_link_of_twenty_megabit_is_measured_as_that(tmp_path: Path, calibration: Path) -> None:
    measured: list[float] = []
    while len(measured) < MEASUREMENTS and not any(each > 14 for each in measured):
        link = _measured(tmp_path / str(len(measured)), calibration)
        assert link["network"] == SUBNET and link["rtt_s"] < 0.5
        measured.append(link["bandwidth_mbps"])
    assert 14 < max(measured) < 24, measured


def _measured(folder: Path, calibration: Path) -> dict[str, Any]:
    folder.mkdir()
    with lan(3) as network:
        office = LanCluster(folder, calibration, lan=network)
        try:
            network.shape(2, "20mbit")
            office.coordinator_on(network[0], "--no-advertise")
            office.node_on(network[1], "fast", "--trusted-lan", "e0")
            office.node_on(network[2], "slow", "--trusted-lan", SUBNET)
            office.wait_ready(2)
            (link,) = until(lambda: office.ask("nodes")["links"], "the pair is measured")
        finally:
            office.close()
    found: dict[str, Any] = link
    return found
