"""What a probe between two machines finds on a link whose rate is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.cluster import until
from tests.netns.lan_cluster import LanCluster
from tests.netns.machines import SUBNET, lan

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(180)]


def test_a_link_of_twenty_megabit_is_measured_as_that(tmp_path: Path, calibration: Path) -> None:
    with lan(3) as network:
        office = LanCluster(tmp_path, calibration, lan=network)
        try:
            network.shape(2, "20mbit")
            office.coordinator_on(network[0], "--no-advertise")
            office.node_on(network[1], "fast", "--trusted-lan", "e0")
            office.node_on(network[2], "slow", "--trusted-lan", SUBNET)
            office.wait_ready(2)
            (link,) = until(lambda: office.ask("nodes")["links"], "the pair is measured")
        finally:
            office.close()
    assert link["network"] == SUBNET and link["rtt_s"] < 0.5
    assert 14 < link["bandwidth_mbps"] < 24
