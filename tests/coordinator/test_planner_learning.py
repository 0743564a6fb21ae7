from __future__ import annotations

import asyncio
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator import qtable_events
from coordinator.learning import (
    DECISION,
    KINDS,
    OUTCOME,
    TRIAL,
    Learner,
    Measured,
    decision_payload,
    measure,
    outcome_payload,
    usual_step_s,
)
from coordinator.planner import plan
from coordinator.qtable_decisions import evaluation, lines
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import AppendEvent
from protos.capacity import Capacity, FamilyRate
from protos.ids import NodeId
from protos.jobspec import JobSpec, parse
from protos.model import Complexity, Family, LayerProfile, ModelProfile, Requirements
from protos.plan import ClusterView, DataProfile, NodeView, Plan
from protos.states import Activity, Eligibility, NodeLink
from protos.work import Metrics, Usage
from qtable.backoff import deviations, residuals
from qtable.policy import Ledger
from qtable.prior import Prior, load_prior
from qtable.state import StateKey
from strategies.cost import COST_MODEL_VERSION

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
    "odd",
    [
        {"basis": ["remembered"], "counted": True, "ran_s": 1.0},
        {"basis": None, "counted": True, "ran_s": 1.0},
        {"ranks": ["node"], "network": 3},
        {"ranks": {"node": {}}, "basis": 1},
        {"measured_step_s": "1e999", "steps": [], "state": {"cell": 1}},
        {"ran_s": 10**400},
        {"cost_model_version": math.inf},
    ],
)
def test_a_coordinator_starts_and_learns_on_whatever_a_later_version_wrote(
    tmp_path: Path, odd: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        store, learner = MemoryStore(), Learner(tmp_path / "qtable.json")
        made = decide(learner, strategy="single_node")
        payload = outcome_payload(made, slow(made))
        await store.commit(
            AppendEvent(OUTCOME, payload=payload | odd),
            AppendEvent(DECISION, payload={"explored": True, "candidates": 1, "expected_loss_s": []}),
            AppendEvent(qtable_events.IMPORT, payload={"ranks": [1]}),
            AppendEvent(OUTCOME, payload=payload),
        )
        assert await learner.catch_up(store) == 4
        assert learner.table.visits(StateKey(*made.state), "single_node") in (1, 2)
        assert learner.speeds.learned().steps
        assert "event 3 was passed over: AttributeError" in learner.notes
        assert (await evaluation(learner, store))["events"] == 4
        (line,) = [line async for line in lines(store)]
        assert (line["candidates"], line["mask"], line["predictions"]) == (1, {}, {})

    asyncio.run(story())
    assert any("event 3 was passed over" in record.getMessage() for record in caplog.records)


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
    learner.apply(1, OUTCOME, payload)
    assert learner.table.n.sum() == 0
    assert learner.ledger == Ledger(measured.steps * measured.step_s), "it ran all the same"


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


def test_after_a_change_of_the_cost_model_the_ledger_holds_what_it_held_before(tmp_path: Path) -> None:
    """1 jobs ran under an older model, one of them to its end; one explored 2 the snapshot is of that model, so the log
    is read again 3 the loss stands beside all the time that the jobs ran, and exploring goes on."""

    async def story() -> None:
        store, path = MemoryStore(), tmp_path / "qtable.json"
        old = Prior(load_prior().q0, COST_MODEL_VERSION - 1)
        learner = Learner(path, old)
        made = replace(decide(learner), cost_model_version=COST_MODEL_VERSION - 1)
        explored = decision_payload(made, job(), PROFILE, DATA) | {"explored": True, "expected_loss_s": 3.0}
        await store.commit(
            AppendEvent(DECISION, payload=explored),
            AppendEvent(OUTCOME, payload=outcome_payload(made, Measured(True, 1, 4000, 0.1, 0.5))),
            AppendEvent(TRIAL, payload=outcome_payload(made, Measured(False, 1, 500, 0.1, 0.5))),
        )
        await learner.catch_up(store)
        assert learner.ledger == Ledger(450.0, 3.0) and learner.ledger.affords(1.5)
        assert learner.table.n.sum() == 1
        newer = Learner(path)
        assert "of another cost model" in newer.notes
        await newer.catch_up(store)
        assert newer.ledger == learner.ledger
        assert newer.table.n.sum() == 0, "what corrected the old formulas says nothing of the new ones"

    asyncio.run(story())


@pytest.mark.parametrize("ran_s", [math.nan, math.inf, -1.0])
def test_a_time_that_no_job_can_have_run_is_not_credited(tmp_path: Path, ran_s: float) -> None:
    learner = Learner(tmp_path / "qtable.json")
    made = decide(learner)
    assert not learner.apply(1, OUTCOME, outcome_payload(made, slow(made)) | {"ran_s": ran_s})
    assert (learner.ledger, learner.table.n.sum()) == (Ledger(), 0)
    assert "event 1 was passed over" in learner.notes


def test_the_same_job_again_teaches_the_table_nothing_and_the_next_model_is_predicted_as_unsurely(
    tmp_path: Path,
) -> None:
    """1 a job takes twice as long as the formulas say 2 the same comes again ten times, predicted with the step that it
    took 3 a model that nobody has seen is expected to be as far off as after the first of them."""

    async def story() -> None:
        store, learner = MemoryStore(), Learner(tmp_path / "qtable.json")
        first = decide(learner, strategy="single_node")
        await ran(store, first, slow(first, 2.0))
        await learner.catch_up(store)
        key = StateKey(*first.state)
        known = residuals(learner.table, key), deviations(learner.table, key)
        assert known[0]["single_node"] < 0
        for _ in range(10):
            cluster = ClusterView(CLUSTER.nodes, learned=learner.speeds.learned())
            again = plan(
                job(strategy="single_node", nodes={"require": {"names": ["a"]}}),
                PROFILE, DATA, cluster, learner.table, random.Random(0), learner.ledger,
            )  # fmt: skip
            assert again.estimate.basis is not None and again.estimate.basis.remembered
            await ran(store, again, slow(again, 1.0))
            await learner.catch_up(store)
        assert (residuals(learner.table, key), deviations(learner.table, key)) == known
        assert learner.table.visits(key, "single_node") == 1
        assert learner.ledger.job_s == pytest.approx(11 * 1000 * 2 * first.estimate.step_s), "it ran all the same"
        judged = (await evaluation(learner, store))["errors"][0]
        assert judged["jobs"] == 11
        assert judged["error_with"] == judged["error_without"], "nor was any of them planned with what it holds"

    asyncio.run(story())
