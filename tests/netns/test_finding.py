"""Two machines on a LAN find each other by zeroconf, both ways, and join across it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import until
from tests.netns.lan_cluster import LanCluster
from tests.netns.machines import lan

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture
def office(tmp_path: Path, calibration: Path) -> Iterator[LanCluster]:
    with lan(2) as network:
        made = LanCluster(tmp_path, calibration, lan=network)
        try:
            made.coordinator_on(network[0])
            yield made
        finally:
            made.close()


def seen(office: LanCluster, name: str) -> dict[str, Any] | None:
    machines = office.ask("nodes", "--lan")["lan"]
    return next((machine for machine in machines if machine["name"] == name), None)


def test_a_node_with_nothing_but_the_token_finds_its_coordinator_on_the_lan(office: LanCluster) -> None:
    office.machine_on(office.lan[1], "laptop", "--token", office.token)
    (node,) = office.wait_ready(1)
    assert node["name"] == "laptop"
    until(lambda: 0 < (office.show_nodes()[0]["rtt_s"] or 0) < 0.1, "its round trip is measured")
    joined = until(lambda: (found := seen(office, "laptop")) and found["joined"] and found, "it says that it joined")
    assert joined["id"] == node["id"] and joined["address"] == office.lan[1].address and not joined["join"]


def test_a_machine_that_waits_is_listed_with_the_command_that_joins_it(office: LanCluster) -> None:
    waiting = office.machine_on(office.lan[1], "attic")
    found = until(lambda: seen(office, "attic"), "the waiting machine is seen")
    assert not found["joined"] and found["address"] == office.lan[1].address
    assert found["cores"] == 1 and found["memory_bytes"] > 0
    assert office.ask("nodes")["nodes"] == []
    program, *typed = shlex.split(found["join"])
    assert program == "hive-node"
    assert found["join"].rpartition(".")[0] in office.hive("nodes", "--lan").stdout
    office.prefix = office.lan[1].prefix  # its owner types it there
    done = office.hive_node("attic", *typed, check=False)
    office.prefix = office.lan[0].prefix
    assert done.returncode == 0, done.stderr
    (node,) = office.wait_ready(1)
    assert node["name"] == "attic"
    assert waiting.process is not None and waiting.process.poll() is None, "it works on"
