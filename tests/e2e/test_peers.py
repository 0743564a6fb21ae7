"""Three nodes among themselves: links measured in turn, a file fetched from a node that has it, and one that does not
listen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.artifact import digest_file
from tests.e2e.cluster import Cluster, until

NAMES = ("n0", "n1", "deaf")
JOBS = Path(__file__).parent / "jobs"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("peers"), calibration)
    try:
        cluster.start_coordinator()
        cluster.start_node("n0")
        cluster.start_node("n1")
        cluster.start_node("deaf", 1, "2GiB", "--no-advertise", "--no-peer")
        cluster.wait_ready(3)
        yield cluster
    finally:
        cluster.close()


def test_every_pair_is_measured_also_the_one_that_does_not_listen(made: Cluster) -> None:
    links = until(lambda: len(found := made.ask("nodes")["links"]) == 3 and found, "three pairs are measured")
    ids = {node["id"]: node for node in made.show_nodes()}
    assert {frozenset((link["a"], link["b"])) for link in links} == {
        frozenset((a, b)) for a in ids for b in ids if a < b
    }
    for link in links:
        assert link["network"] == "loopback" and 0 < link["rtt_s"] < 1 and link["bandwidth_mbps"] > 1
    ports = {node["name"]: node["capacity"]["peer_port"] for node in ids.values()}
    assert ports["deaf"] is None and ports["n0"] and ports["n1"] and ports["n0"] != ports["n1"]
    assert "relayed" in made.hive("nodes").stdout
    checks = {name: _peer_check(made, name) for name in ("n0", "deaf")}
    assert str(ports["n0"]) in checks["n0"] and "--no-peer" in checks["deaf"]
    assert any("deaf" in check["message"] for check in made.ask("doctor")["checks"] if check["name"] == "peer links")


def _peer_check(made: Cluster, name: str) -> str:
    document = json.loads(made.hive_node(name, "doctor", "-o", "json").stdout)
    return str(next(check["message"] for check in document["checks"] if check["name"] == "peers"))


def test_a_node_fetches_what_another_one_has_from_an_earlier_job(made: Cluster, tmp_path: Path) -> None:
    """1 a job with a large source file runs on n0 2 one with the same file runs on a node that has never seen it
    3 it comes from n0, and where nobody can say no without a word, the job does as well."""
    (tmp_path / "model.py").write_text((JOBS / "model.py").read_text() + "\n# " + "x" * 1_500_000 + "\n")
    digest = digest_file(tmp_path / "model.py")
    job = tmp_path / "job.yaml"
    job.write_text(
        "model: {source: model.py:mlp}\ndata: {source: builtin:digits}\nstrategy: single_node\n"
        "train: {loss: cross_entropy, optimizer: {name: sgd, lr: 0.1}, batch_size: 64, steps: 5}\n"
    )

    def run_on(name: str) -> None:
        ended = made.wait(made.submit(job, f"nodes.require.names=[{name}]"))
        assert (ended["state"], ended["nodes"]) == ("SUCCEEDED", [name]), ended["message"]

    def has(name: str) -> bool:
        return (made.folder / name / "node" / "cache" / digest[:2] / digest[2:]).exists()

    run_on("n0")
    other = next(name for name in ("n1", "deaf") if not has(name))  # the model was identified on one node at most
    run_on(other)
    assert has(other)
    assert f"digest={digest}" in next(
        line for line in made.nodes[other].said().splitlines() if "fetched from a peer" in line
    )
