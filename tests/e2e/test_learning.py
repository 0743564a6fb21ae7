"""A choice that turned out wrong is not made again: what a job really took corrects the prediction, for good."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from protos import documents
from protos.capacity import Calibration, FamilyRate, Rate
from tests.e2e.cluster import CALIBRATION, Cluster, cluster

JOB = Path(__file__).parent / "jobs" / "mlp.yaml"
# Believed: nothing but arithmetic costs time, 6 us per sample of this model. So half a batch takes half as long.
ALL_ARITHMETIC = FamilyRate(flops=2.3e9, overhead_s=1e-6)
FREE_MEMORY = Rate(1e12, 1e12, 0.0)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def made(tmp_path: Path, calibration: Path) -> Iterator[Cluster]:
    with cluster(tmp_path, calibration) as started:
        yield started


def believe(made: Cluster) -> None:
    """Replace what the nodes have measured about themselves in their caches, and start them again."""
    for node in made.nodes.values():
        node.end()
        for file in (node.home / CALIBRATION).glob("*.json"):
            measured = documents.decode(Calibration, file.read_bytes())
            families = dict.fromkeys(measured.families, ALL_ARITHMETIC)
            file.write_bytes(documents.encode(replace(measured, families=families, memory_bandwidth=FREE_MEMORY)))
        node.start()
    made.calibration = None  # these figures are for this test only
    made.wait_ready(len(made.nodes))


def test_an_outcome_that_contradicts_the_prediction_changes_the_next_choice_across_a_restart(made: Cluster) -> None:
    believe(made)
    sets = ("strategy=auto", "train.steps=4000", "train.evaluate_every=never")
    first = made.submit(JOB, *sets)
    assert made.wait(first)["state"] == "SUCCEEDED"
    explained = made.ask("explain", first)
    assert explained["plan"]["strategy"] == "data_parallel", explained["plan"]["reason"]
    assert "the shortest prediction" in explained["plan"]["reason"]

    events = {event["kind"]: event["payload"] for event in made.events("--job", first)}
    decision, outcome = events["decision"], events["outcome"]
    assert (decision["strategy"], decision["forced"], decision["explored"]) == ("data_parallel", False, False)
    assert decision["plan_id"] == outcome["plan_id"] == explained["plan"]["id"]
    assert outcome["counted"] and outcome["reward"] < 0
    assert outcome["measured_s"] > outcome["predicted_s"]
    assert explained["measured"]["reward"] == outcome["reward"]

    assert made.coordinator is not None
    made.coordinator.kill()
    made.start_coordinator()
    made.wait_ready(2)

    second = made.submit(JOB, *sets)
    assert made.wait(second)["state"] == "SUCCEEDED"
    plan = made.ask("explain", second)["plan"]
    assert plan["strategy"] == "single_node", plan["reason"]
    assert "earlier jobs like this one" in plan["reason"]
    tried = {candidate["strategy"]: candidate for candidate in plan["candidates"]}["data_parallel"]
    assert tried["feasible"] and tried["visits"] == 1 and tried["residual"] < 0
    predicted = {candidate["strategy"]: candidate["seconds"] for candidate in plan["candidates"]}
    assert predicted["data_parallel"] < predicted["single_node"], "by the model alone it would be chosen again"
