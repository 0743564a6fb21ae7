"""One coordinator and two nodes on loopback with a data_parallel job that runs as long as the tests do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from protos import credentials
from protos.credentials import Credential
from tests.e2e.cluster import Cluster, Process

JOB = Path(__file__).parent.parent / "e2e" / "jobs" / "long.yaml"


@dataclass
class Working:
    """A cluster at work: n0 was given its token as a flag, n1 by HIVE_TOKEN."""

    cluster: Cluster
    job_id: str = ""

    def begin(self) -> None:
        """A job on both nodes that nobody will wait for."""
        if self.job_id:
            self.cluster.hive("cancel", self.job_id)
        self.cluster.wait_ready(2)
        self.job_id = self.cluster.submit(JOB, "train.steps=1000000")
        job = self.cluster.wait_step(self.job_id, 20)
        assert sorted(job["nodes"]) == ["n0", "n1"]

    @property
    def coordinator_pid(self) -> int:
        assert self.cluster.coordinator is not None
        return self.cluster.coordinator.pid

    @property
    def front_port(self) -> int:
        return int(self.cluster.address.rpartition(":")[2])

    @property
    def session_address(self) -> str:
        return f"127.0.0.1:{self.cluster.session_port}"

    @property
    def owner(self) -> Credential:
        return credentials.load(self.cluster.home / "client" / "credential.json")

    def node(self, name: str) -> Credential:
        return credentials.load(self.cluster.folder / name / "node" / "credential.json")

    def peer_port(self, name: str) -> int:
        """Where a node serves the others."""
        return next(int(n["capacity"]["peer_port"]) for n in self.cluster.show_nodes() if n["name"] == name)

    def token(self, role: str) -> str:
        """A fresh token, good for one join."""
        return str(self.cluster.ask("token", "create", "--role", role)["token"]["token"])

    def goes_on(self) -> None:
        """The job commits further steps, in the group it has."""
        before = self.cluster.show(self.job_id)
        after = self.cluster.wait_step(self.job_id, before["step"] + 20)
        assert after["fence"] == before["fence"]


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "calibration"


@pytest.fixture(scope="package")
def working(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> Iterator[Working]:
    cluster = Cluster(tmp_path_factory.mktemp("guarded"), calibration)
    try:
        cluster.start_coordinator()
        cluster.start_node("n0")
        _start_by_environment(cluster, "n1")
        made = Working(cluster)
        made.begin()
        yield made
        cluster.hive("cancel", made.job_id, check=False)
    finally:
        cluster.close()


def _start_by_environment(cluster: Cluster, name: str) -> None:
    home = cluster.folder / name
    home.mkdir(parents=True)
    environment = {**cluster.environment(home), "HIVE_TOKEN": cluster.token, "HIVE_COORDINATOR": cluster.address}
    environment["HIVE_NAME"] = name
    arguments = ["node.cli", "start", "--cpus", "1", "--memory", "2GiB", "--allow-root", "--no-advertise"]
    node = Process(name, home, arguments, environment)
    cluster.nodes[name] = node
    node.start()
