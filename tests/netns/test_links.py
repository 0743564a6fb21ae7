"""Machines that trust their LAN train together across it, also through outages; machines that do not, do not."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import until
from tests.netns.lan_cluster import LanCluster
from tests.netns.machines import SUBNET, Lan, connections, lan, listening

JOB = Path(__file__).parent.parent / "e2e" / "jobs" / "long.yaml"
STEPS = 1000
LONG = f"train.steps={STEPS}"
ROWS = 1438  # of builtin:digits' training part, in 23 steps per epoch
SAMPLES = (STEPS // 23) * ROWS + sum([64] * (STEPS % 23))

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]


@contextlib.contextmanager
def office_on(network: Lan, folder: Path, calibration: Path) -> Iterator[LanCluster]:
    made = LanCluster(folder, calibration, lan=network)
    try:
        made.coordinator_on(network[0], "--no-advertise")
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> Iterator[LanCluster]:
    """The coordinator's machine, and two that train: unlike names, and one has another network's address first."""
    with (
        lan(3, ("e0", "e0", "wan7"), before={2: "10.79.0.1/24"}) as network,
        office_on(network, tmp_path_factory.mktemp("trusting"), calibration) as made,
    ):
        made.node_on(network[1], "n1", "--trusted-lan", "e0")
        made.node_on(network[2], "n2", "--trusted-lan", SUBNET)
        yield made


@pytest.fixture
def office(trusting: LanCluster) -> LanCluster:
    trusting.heal()
    return trusting


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> Iterator[LanCluster]:
    """Two machines that trust no network, one on a slower link."""
    with lan(3) as network, office_on(network, tmp_path_factory.mktemp("strangers"), calibration) as made:
        network.shape(1, "100mbit")
        made.node_on(network[1], "slow")
        made.node_on(network[2], "quick")
        made.wait_ready(2)
        yield made


def check_finished(office: LanCluster, job_id: str, steps: int = STEPS, samples: int = SAMPLES) -> dict[str, Any]:
    job = office.wait(job_id, 200)
    assert job["state"] == "SUCCEEDED", job
    assert (job["step"], job["samples"]) == (steps, samples)
    report: dict[str, Any] = json.loads(office.artifact(job_id, "report.json").read_text())
    return report


def test_without_a_trusted_lan_the_job_is_refused_with_the_flag_that_would_allow_it(strangers: LanCluster) -> None:
    refused = strangers.hive("plan", str(JOB), check=False)
    assert refused.returncode == 7, refused
    assert "share a trusted network" in refused.stderr and "--trusted-lan" in refused.stderr
    submitted = strangers.hive("submit", str(JOB), "--wait", "-o", "json", check=False)
    assert submitted.returncode == 7, submitted
    assert "--trusted-lan" in submitted.stdout


def test_two_machines_train_together_over_the_lan_both_named(office: LanCluster) -> None:
    job_id = office.submit(JOB, LONG)
    office.wait_step(job_id, 100)
    addresses = {name: office.lan[number].address for name, number in (("n1", 1), ("n2", 2))}
    for name, own in addresses.items():
        (other,) = set(addresses.values()) - {own}
        (worker,) = office.worker_pids(name)
        assert {address for address, _ in listening(worker)} == {own}, "gloo listens on the trusted address only"
        assert connections(worker) == {(own, other)}
        daemon = {address for address, _ in listening(office.nodes[name].pid)}
        assert daemon == {"127.0.0.1", own}, "a node daemon listens for its peers on loopback and the trusted address"
    report = check_finished(office, job_id)
    shares = {name: used["samples"] for name, used in report["nodes"].items()}
    assert set(shares) == {"n1", "n2"} and all(shares.values()) and sum(shares.values()) == SAMPLES
    assert SUBNET in json.dumps(report["plan"])


def test_a_link_cut_for_five_seconds_and_healed_costs_no_sample(office: LanCluster) -> None:
    job_id = office.submit(JOB, LONG)
    office.wait_step(job_id, 200)
    with office.lan.cut_off(2, 5.0):
        pass
    check_finished(office, job_id)


def test_training_goes_on_while_the_coordinator_is_cut_off_and_the_result_arrives_later(office: LanCluster) -> None:
    job_id = office.submit(JOB, LONG)
    office.wait_step(job_id, 100)
    workers = {name: office.worker_pids(name) for name in ("n1", "n2")}
    with office.lan.cut_off(0):
        for name, pids in workers.items():
            until(lambda name=name, pids=pids: pids != office.worker_pids(name), f"{name} trains to its end", 120)  # type: ignore[misc]
    check_finished(office, job_id)
    assert office.show(job_id)["fence"] == 1, "what was trained meanwhile is not trained again"


def test_the_measured_bandwidth_and_round_trip_are_those_of_the_link(strangers: LanCluster) -> None:
    def measured() -> dict[str, Any] | None:
        node = next(node for node in strangers.show_nodes() if node["name"] == "slow")
        return node if node.get("bandwidth_mbps") and node.get("rtt_s") else None

    node = until(measured, "the link is measured", 60)
    assert 50 < node["bandwidth_mbps"] < 130, node["bandwidth_mbps"]
    assert 0 < node["rtt_s"] < 0.1
    assert "MBIT/S" in strangers.hive("nodes").stdout
