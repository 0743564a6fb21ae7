"""What a job really took corrects the prediction of the next one, for good."""

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


def test_what_a_job_really_took_is_predicted_the_next_time_across_a_restart(made: Cluster) -> None:
    believe(made)
    sets = ("strategy=data_parallel", "train.steps=4000", "train.evaluate_every=never")
    first = made.submit(JOB, *sets)
    assert made.wait(first)["state"] == "SUCCEEDED"
    explained = made.ask("explain", first)

    events = {event["kind"]: event["payload"] for event in made.events("--job", first)}
    decision, outcome = events["decision"], events["outcome"]
    assert (decision["strategy"], decision["forced"], decision["explored"]) == ("data_parallel", True, False)
    assert decision["plan_id"] == outcome["plan_id"] == explained["plan"]["id"]
    assert outcome["counted"] and outcome["reward"] < 0
    assert outcome["measured_s"] > outcome["predicted_s"]
    assert explained["measured"]["reward"] == outcome["reward"]
    for sides in explained["measured"]["nodes"].values():
        assert sides["measured"]["compute_s"] > sides["predicted"]["compute_s"], "there is more than arithmetic"
        assert sides["measured"]["bytes"] == pytest.approx(sides["predicted"]["bytes"], rel=0.1)

    assert made.coordinator is not None
    made.coordinator.kill()
    made.start_coordinator()
    made.wait_ready(2)

    changed = [part for each in sets for part in ("--set", each)]
    plan = made.ask("plan", str(JOB), *changed)["plan"]
    assert plan["estimate"]["basis"]["remembered"]
    assert plan["estimate"]["step_s"] == pytest.approx(outcome["measured_step_s"])
    tried = {candidate["strategy"]: candidate for candidate in plan["candidates"]}["data_parallel"]
    assert tried["feasible"] and tried["visits"] == 1 and tried["residual"] < 0
    before = explained["plan"]["candidates"]
    alone = {name: each["step_s"] for each in before if (name := each["strategy"]) == "single_node"}
    corrected = {each["strategy"]: each["step_s"] for each in plan["candidates"]}
    assert corrected["single_node"] > alone["single_node"], "the same model on the same node: it is slower there too"
    for node in made.ask("nodes")["nodes"]:
        assert any(each["factor"] > 1 and each["jobs"] == 1 for each in node["learned"].values())
