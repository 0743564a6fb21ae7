from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from coordinator.learning import (
    DECISION,
    KINDS,
    OUTCOME,
    Learner,
    Measured,
    decision_payload,
    measure,
    outcome_payload,
    usual_step_s,
)
from coordinator.planner import plan
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import AppendEvent
from protos.capacity import Capacity, FamilyRate
from protos.ids import NodeId
from protos.jobspec import JobSpec, parse
from protos.model import Complexity, Family, LayerProfile, ModelProfile, Requirements
from protos.plan import ClusterView, DataProfile, NodeView, Plan
from protos.states import Activity, Eligibility, NodeLink
from protos.work import Metrics, Usage
from qtable.policy import Ledger
from qtable.state import StateKey

GIB = 1024**3
DATA = DataProfile("", 64_000, 10**6)
LAYER = LayerProfile("layer", "Linear", 10_000, 1e9, 1e5, 4e3)
PROFILE = ModelProfile(
    "pytorch", "source", Family.MLP, "", 10_000, 40_000, True, ("float32",), (64,), Complexity.SMALL, (LAYER,),
    Requirements(1, GIB, 0, 1, "layers"), 1.0,
)  # fmt: skip


def node(name: str) -> NodeView:
    capacity = Capacity(
        hostname=name, machine_id="one", platform="", python="", cores=1.0, cores_total=2, memory_bytes=4 * GIB,
        memory_total_bytes=8 * GIB, disk_free_bytes=0, families={"matmul": FamilyRate(1e10, 0.001)},
    )  # fmt: skip
    return NodeView(NodeId(name), name, capacity, NodeLink.CONNECTED, Eligibility.OK, Activity.IDLE)


CLUSTER = ClusterView((node("a"), node("b")))


def job(**parts: Any) -> JobSpec:
    return parse({"model": {"source": "m.py:f"}, "data": {"source": "d"}, "train": {"batch_size": 64}, **parts})


def decide(learner: Learner, **parts: Any) -> Plan:
    return plan(job(**parts), PROFILE, DATA, CLUSTER, learner.table, random.Random(0), learner.ledger)


def slow(made: Plan, factor: float = 8.0) -> Measured:
    return Measured(True, 1, 1000, made.estimate.step_s * factor, 0.5)


async def ran(store: MemoryStore, made: Plan, measured: Measured) -> None:
    """What the service appends around a job."""
    await store.commit(AppendEvent(DECISION, None, None, decision_payload(made, job(), PROFILE, DATA)))
    await store.commit(AppendEvent("job", None, None, {"state": "SUCCEEDED"}))
    await store.commit(AppendEvent(OUTCOME, None, None, outcome_payload(made, measured)))


def test_an_outcome_that_contradicts_the_prior_makes_the_second_plan_choose_otherwise(tmp_path: Path) -> None:
    """Predicted twice as fast on two nodes, measured four times slower: the second submit takes one, also after a
    restart from the snapshot, and after a restart that finds no snapshot and reads the log."""

    async def story() -> None:
        store, path = MemoryStore(), tmp_path / "qtable.json"
        learner = Learner(path)
        first = decide(learner)
        assert first.strategy == "data_parallel"
        await ran(store, first, slow(first))
        assert await learner.catch_up(store) == 2
        assert decide(learner).strategy == "single_node"
        assert "earlier jobs like this one" in decide(learner).reason

        restarted = Learner(path)
        assert restarted.notes == "qtable.json at event 3"
        assert await restarted.catch_up(store) == 0
        assert decide(restarted).strategy == "single_node"

        path.unlink()
        rebuilt = Learner(path)
        assert decide(rebuilt).strategy == "data_parallel"
        assert await rebuilt.catch_up(store) == 2
        assert decide(rebuilt).strategy == "single_node"
        assert (rebuilt.table.q == learner.table.q).all()
        assert rebuilt.ledger == learner.ledger

    asyncio.run(story())


def test_no_outcome_is_applied_twice_however_often_the_log_is_read(tmp_path: Path) -> None:
    async def story() -> None:
        store, learner = MemoryStore(), Learner(tmp_path / "qtable.json")
        made = decide(learner)
        await ran(store, made, slow(made))
        await asyncio.gather(*(learner.catch_up(store) for _ in range(5)))
        await Learner(tmp_path / "qtable.json").catch_up(store)
        assert learner.table.visits(StateKey(*made.state), "data_parallel") == 1
        (outcome,) = await store.events(kinds=[OUTCOME])
        assert not learner.apply(outcome.seq, OUTCOME, json.loads(outcome.payload_json))

    asyncio.run(story())


def test_a_snapshot_of_another_log_gives_way_to_the_log(tmp_path: Path) -> None:
    async def story() -> None:
        path, store, other = tmp_path / "qtable.json", MemoryStore(), MemoryStore()
        learner = Learner(path)
        made = decide(learner)
        await ran(store, made, slow(made))
        await learner.catch_up(store)
        moved = Learner(path)
        await moved.catch_up(other)
        assert moved.table.visits(StateKey(*made.state), "data_parallel") == 0
        assert "not in this log" in moved.notes

    asyncio.run(story())


def test_a_snapshot_that_cannot_be_written_does_not_stop_the_learning(tmp_path: Path) -> None:
    async def story() -> None:
        (tmp_path / "file").write_text("not a folder")
        store, learner = MemoryStore(), Learner(tmp_path / "file" / "qtable.json")
        made = decide(learner)
        await ran(store, made, slow(made))
        assert await learner.catch_up(store) == 2
        assert "could not be written" in learner.problem
        assert decide(learner).strategy == "single_node"

    asyncio.run(story())


def test_an_event_of_a_later_version_is_passed_over_and_told(tmp_path: Path) -> None:
    learner = Learner(tmp_path / "qtable.json")
    assert not learner.apply(1, OUTCOME, {"counted": True, "state": [9, 9, 9, 9]})
    assert not learner.apply(2, DECISION, {})
    assert "event 1 was passed over" in learner.notes
    assert learner.table.last_seq == 2


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        (Measured(False, 1, 500, 0.1, 0.5), "did not run to its end"),
        (Measured(True, 3, 5, 0.1, 0.5), "its last group made 5 steps only"),
        (Measured(True, 1, 0, 0.0, 0.5), "no step was measured"),
    ],
)
def test_a_job_that_went_another_way_than_planned_teaches_nothing_and_says_so(
    tmp_path: Path, measured: Measured, why: str
) -> None:
    learner = Learner(tmp_path / "qtable.json")
    payload = outcome_payload(decide(learner), measured)
    assert (payload["counted"], payload["reward"]) == (False, None)
    assert why in payload["why"]
    assert not learner.apply(1, OUTCOME, payload)
    assert learner.ledger == Ledger()


def test_a_job_that_stopped_for_a_while_is_measured_by_its_median_step(tmp_path: Path) -> None:
    made = decide(Learner(tmp_path / "qtable.json"))
    step_s = made.estimate.step_s
    times = [step * step_s + (3600.0 if step > 5 else 0.0) for step in range(1, 11)]
    records = [Metrics(time, step, 0, "train", 1.0, 64 * step) for step, time in enumerate(times, 1)]
    usage = Usage(640, 10, 3700.0, 0, 0, 0, 0, startup_s=made.estimate.terms["startup"])
    payload = outcome_payload(made, measure([usage], records))
    assert payload["counted"]
    assert payload["reward"] == pytest.approx(0.0, abs=1e-6)
    assert payload["predicted_s"] == pytest.approx(made.estimate.seconds)


def test_the_usual_step_ignores_evaluations_and_counts_gaps_between_records() -> None:
    records = [
        Metrics(0.0, 1, 0, "train", 1.0, 1), Metrics(4.0, 3, 0, "train", 1.0, 1),
        Metrics(90.0, 3, 0, "evaluate", 1.0, 1),
        Metrics(92.0, 4, 1, "train", 1.0, 1), Metrics(94.0, 5, 1, "train", 1.0, 1),
    ]  # fmt: skip
    assert usual_step_s(records) == 2.0
    assert usual_step_s(records[:1]) is None
    assert measure([Usage(1, 10, 30.0, 0, 0, 0, 0), Usage(1, 10, 40.0, 0, 0, 0, 0)]).step_s == 4.0


def test_a_decision_is_written_down_with_everything_that_made_it(tmp_path: Path) -> None:
    learner = Learner(tmp_path / "qtable.json")
    payload = decision_payload(decide(learner), job(), PROFILE, DATA)
    assert json.loads(json.dumps(payload)) == payload
    assert [candidate["strategy"] for candidate in payload["candidates"]][-1] == "single_node"
    assert (payload["propensity"], payload["explored"], payload["expected_loss_s"]) == (1.0, False, 0.0)
    assert decision_payload(decide(learner), job(strategy="data_parallel"), PROFILE, DATA)["forced"]
    assert {DECISION, OUTCOME} < set(KINDS)


def test_what_exploring_costs_is_charged_when_it_is_decided(tmp_path: Path) -> None:
    learner = Learner(tmp_path / "qtable.json")
    payload = decision_payload(decide(learner), job(), PROFILE, DATA) | {"explored": True, "expected_loss_s": 3.0}
    assert learner.apply(1, DECISION, payload)
    assert not learner.apply(1, DECISION, payload)
    assert learner.ledger == Ledger(0.0, 3.0)
