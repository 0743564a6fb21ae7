"""What a job really took corrects the prediction of the next one, for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from protos import documents
from protos.capacity import Calibration, FamilyRate, Rate
from tests.e2e.cluster import CALIBRATION, Cluster, cluster, until

WIDE = Path(__file__).parent / "jobs" / "long.yaml"
# Believed: a step costs next to nothing but what being in a group does.
ALL_ARITHMETIC = FamilyRate(flops=2e12, overhead_s=1e-6)
FREE_MEMORY = Rate(1e12, 1e12, 0.0)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def made(tmp_path: Path, calibration: Path) -> Iterator[Cluster]:
    with cluster(tmp_path, calibration) as started:
        yield started


def believe(made: Cluster, names: Sequence[str], change: Callable[[Calibration], Calibration]) -> None:
    """Replace what these nodes have measured about themselves in their caches, and start them again."""
    for name in names:
        made.nodes[name].end()
    until(lambda: not {made.states()[name] for name in names} & {"CONNECTED IDLE"}, "the coordinator noticed")
    for name in names:
        for file in (made.nodes[name].home / CALIBRATION).glob("*.json"):
            file.write_bytes(documents.encode(change(documents.decode(Calibration, file.read_bytes()))))
        made.nodes[name].start()
    made.calibration = None  # these figures are for this test only
    made.wait_ready(len(made.nodes))


def all_arithmetic(measured: Calibration) -> Calibration:
    return replace(measured, families=dict.fromkeys(measured.families, ALL_ARITHMETIC), memory_bandwidth=FREE_MEMORY)


def all_arithmetic_of_a_real_machine(measured: Calibration) -> Calibration:
    """So slow that two nodes are clearly quicker than one, whatever this machine did while it measured."""
    rate = FamilyRate(flops=12e9, overhead_s=1e-4)
    return replace(measured, families=dict.fromkeys(measured.families, rate), memory_bandwidth=FREE_MEMORY)


def boasting(measured: Calibration) -> Calibration:
    families = {name: FamilyRate(20 * rate.flops, rate.overhead_s / 20) for name, rate in measured.families.items()}
    return replace(measured, families=families)


def test_a_node_that_turned_out_slow_is_not_chosen_again_across_a_restart(made: Cluster) -> None:
    """It has a quarter of a core and boasts of five: that is further from n0 than a busy machine makes."""
    made.start_node("boaster", 0.25, "2GiB")
    made.wait_ready(len(made.nodes))
    believe(made, ["boaster"], boasting)

    sets = ("strategy=auto", "nodes.max=1", "nodes.require.names=[boaster, n0]", "train.steps=200")
    first = made.submit(WIDE, *sets, "train.batch_size=256")
    assert made.wait(first)["nodes"] == ["boaster"]
    assert made.coordinator is not None
    made.coordinator.kill()
    made.start_coordinator()
    made.wait_ready(len(made.nodes))
    second = made.submit(WIDE, *sets, "train.batch_size=256")
    assert made.wait(second)["nodes"] == ["n0"], made.ask("explain", second)["plan"]["reason"]


def test_a_job_that_is_far_slower_than_predicted_changes_its_strategy_and_loses_nothing(made: Cluster) -> None:
    """1 together they should be quicker 2 they are not: one goes on alone from where they were 3 the next job of the
    kind starts alone."""
    believe(made, ["n0", "n1"], all_arithmetic_of_a_real_machine)
    sets = ("model.source=model.py:hesitant", "train.batch_size=512", "train.steps=400", "strategy=auto")
    sets = (*sets, "nodes.require.names=[n0, n1]", "train.evaluate_every=never")
    first = made.submit(WIDE, *sets)
    ended = made.wait(first)
    assert (ended["state"], ended["strategy"], ended["step"]) == ("SUCCEEDED", "single_node", 400)
    said = [
        event["payload"] for event in made.events("--job", first) if event["kind"] in ("decision", "trial", "outcome")
    ]
    assert [each["strategy"] for each in said][:2] == ["data_parallel"] * 2
    assert said[1]["counted"] and said[1]["measured_step_s"] > 0.15 > said[1]["predicted_step_s"]
    metrics = made.metrics(first)
    assert [line["step"] for line in metrics] == list(range(1, 401)), "no step was made twice or left out"
    seen = made.ask("explain", first)["hindsight"]
    assert [each["strategy"] for each in seen["decisions"]] == ["data_parallel", "single_node"]
    assert all(len(each["candidates"]) == 5 and each["reason"] for each in seen["decisions"])
    assert seen["regret"]["switching_s"] > 0 and seen["regret"]["earlier_groups_s"] > 0
    assert "DECISION 2: single_node" in made.hive("explain", first).stdout
    again = made.submit(WIDE, *sets)
    assert made.wait(again)["strategy"] == "single_node"
    assert made.show(again)["fence"] == 1, "it knew"


def test_what_a_job_really_took_is_predicted_the_next_time_across_a_restart(made: Cluster) -> None:
    believe(made, ["n0", "n1"], all_arithmetic)
    sets = ("strategy=data_parallel", "train.steps=1000", "train.batch_size=512", "train.evaluate_every=never")
    first = made.submit(WIDE, *sets)
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
    plan = made.ask("plan", str(WIDE), *changed)["plan"]
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
