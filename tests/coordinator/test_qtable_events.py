"""What is done to the table is in the log: whatever the order of outcomes, imports, resets and restarts, a rebuild from
the log gives the table in use."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.qtable_kill import failures, run
from coordinator import qtable_events, qtable_replay
from coordinator.learning import DECISION, KINDS, OUTCOME, TRIAL, Learner
from coordinator.records import Event
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import AppendEvent
from protos.ids import JobId
from protos.plan import Work
from qtable import snapshot
from qtable.policy import Ledger
from qtable.prior import load_prior
from qtable.state import ACTIONS, StateKey
from qtable.table import QTable
from strategies.cost import COST_MODEL_VERSION

KEYS = [(0, 0, 0, 0), (1, 2, 1, 0), (3, 2, 3, 2)]
ORIGINS = ("", "here", "there", "zenith")


def outcome(
    key: int, action: int, factor: float, kind: str = OUTCOME, version: int = COST_MODEL_VERSION
) -> AppendEvent:
    payload = {
        "plan_id": "p", "strategy": ACTIONS[action], "state": KEYS[key], "predicted_s": 10.0,
        "measured_s": 10.0 * factor, "measured_step_s": 0.1 * factor, "ran_s": 10.0 * factor, "counted": True,
        "why": "", "cost_model_version": version,
        "basis": {"work": Work.WHOLE.value, "model": "m", "combination": f"c-{action}", "modelled_step_s": 0.1,
                  "remembered": False},
        "ranks": [],
    }  # fmt: skip
    return AppendEvent(kind, payload=payload)


def exported(origin: str, outcomes: list[tuple[int, int, float]]) -> QTable:
    table = load_prior().table(origin)
    for key, action, factor in outcomes:
        table.learn(StateKey(*KEYS[key]), ACTIONS[action], -np.log(factor))
        table.last_seq += 1
    return table


def table_import(table: QTable) -> AppendEvent:
    parts = table.contributions()
    return AppendEvent(
        qtable_events.IMPORT, payload=qtable_events.table_import(parts, table.cost_model_version, "x.json", "c-me")
    )


OUTCOMES = st.tuples(st.integers(0, 2), st.integers(0, 4), st.floats(0.2, 5.0))
RANKS = st.dictionaries(st.integers(0, 143), st.permutations([0, 1, 2, None, None]), max_size=4)
EVENTS = st.one_of(
    st.tuples(OUTCOMES, st.sampled_from([OUTCOME, TRIAL]), st.sampled_from([COST_MODEL_VERSION, 0])).map(
        lambda each: outcome(*each[0], *each[1:])
    ),
    st.tuples(st.sampled_from(ORIGINS[1:]), st.lists(OUTCOMES, max_size=4)).map(
        lambda each: table_import(exported(*each))
    ),
    RANKS.map(
        lambda found: AppendEvent(qtable_events.IMPORT, payload=qtable_events.ranks_import(found, "q.pkl", "me"))
    ),
    st.just(AppendEvent(qtable_events.RESET, payload={"by": "me"})),
    st.floats(0, 9).map(lambda loss: AppendEvent(DECISION, payload={"explored": True, "expected_loss_s": loss})),
    st.sampled_from(
        [{}, {"contributions": {"": {}}, "cost_model_version": COST_MODEL_VERSION}, {"ranks": {"x": [1]}}]
    ).map(lambda odd: AppendEvent(qtable_events.IMPORT, payload=odd)),
    st.sampled_from(["restart", "catch up", "lose the snapshot"]),
)


def state_of(learner: Learner) -> tuple[dict[str, Any], Any]:
    return snapshot.document(learner.table, learner.ledger), learner.speeds.learned()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(EVENTS, max_size=14), origin=st.sampled_from(ORIGINS[:2]))
def test_a_rebuild_gives_the_table_in_use_whatever_happened(
    tmp_path: Path, events: list[AppendEvent | str], origin: str
) -> None:
    path = tmp_path / f"{next(_NUMBERS)}" / "qtable.json"

    async def story() -> None:
        store, learner = MemoryStore(), Learner(path, origin=origin)
        for event in events:
            if isinstance(event, AppendEvent):
                await store.commit(event)
                continue
            await learner.catch_up(store)
            if event != "catch up":
                if event != "restart":
                    path.unlink(missing_ok=True)
                learner = Learner(path, origin=origin)
        await learner.catch_up(store)
        before = copy.deepcopy(state_of(learner))
        found = await qtable_replay.rebuild(learner, store)
        assert found.differs == ()
        assert state_of(learner) == before
        restarted = Learner(path, origin=origin)
        await restarted.catch_up(store)
        assert state_of(restarted) == before

    asyncio.run(story())


_NUMBERS = itertools.count()


def test_a_rebuild_names_what_differs_and_the_log_wins(tmp_path: Path) -> None:
    async def story() -> None:
        store, learner = MemoryStore(), Learner(tmp_path / "qtable.json")
        await store.commit(outcome(0, 0, 2.0))
        await learner.catch_up(store)
        learner.table.learn(StateKey(0, 0, 0, 0), "single_node", 1.0)
        learner.ledger = Ledger(5.0, 1.0)
        found = await qtable_replay.rebuild(learner, store)
        assert {"Q", "n", "ledger", "contributions"} <= set(found.differs)
        assert (found.events, found.last_seq) == (1, 1)
        assert learner.table.visits(StateKey(0, 0, 0, 0), "single_node") == 0
        assert (await qtable_replay.rebuild(learner, store)).differs == ()
        assert snapshot.load(tmp_path / "qtable.json").reason == "qtable.json at event 1"

    asyncio.run(story())


class Busy(MemoryStore):
    """Something happens while the log is read from its beginning, once."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: list[Callable[[], Awaitable[object]]] = []

    async def events(
        self,
        after_seq: int = 0,
        job_id: JobId | None = None,
        kinds: Collection[str] | None = None,
        limit: int = 1000,
    ) -> tuple[Event, ...]:
        page = await super().events(after_seq, job_id, kinds, limit)
        if after_seq == 0 and limit > 1:
            todo, self.meanwhile = self.meanwhile, []
            for each in todo:
                await each()
        return page


@pytest.mark.parametrize("read", [True, False])
def test_a_rebuild_acts_although_a_job_ends_meanwhile_and_has_it_too(tmp_path: Path, read: bool) -> None:
    """1 the table in use is damaged 2 while the log is read again a job ends, which the table in use learns from, or
    not yet 3 the damage is told and gone, and the job that ended is in."""

    async def story() -> None:
        store, learner = Busy(), Learner(tmp_path / "qtable.json")
        await store.commit(outcome(0, 0, 2.0))
        await learner.catch_up(store)
        learner.table.learn(StateKey(0, 0, 0, 0), "single_node", 1.0)
        store.meanwhile.append(lambda: store.commit(outcome(1, 1, 3.0)))
        if read:
            store.meanwhile.append(lambda: learner.catch_up(store))
        found = await qtable_replay.rebuild(learner, store)
        assert (found.events, found.last_seq) == (1, 1)
        assert {"Q", "n"} <= set(found.differs)
        clean = Learner(tmp_path / "none" / "qtable.json")
        await clean.catch_up(store)
        assert state_of(learner) == state_of(clean)
        assert clean.table.n.sum() == 2
        assert snapshot.load(tmp_path / "qtable.json").reason == "qtable.json at event 2"
        assert await learner.catch_up(store) == 0
        assert (await qtable_replay.rebuild(learner, store)).differs == ()

    asyncio.run(story())


def test_a_reset_forgets_table_ledger_and_speeds_and_learning_goes_on(tmp_path: Path) -> None:
    async def story() -> None:
        store, learner = MemoryStore(), Learner(tmp_path / "qtable.json", origin="here")
        fresh = state_of(Learner(tmp_path / "none.json", origin="here"))
        await store.commit(outcome(0, 0, 2.0), table_import(exported("there", [(0, 0, 3.0)])))
        await learner.catch_up(store)
        assert state_of(learner) != fresh
        await store.commit(AppendEvent(qtable_events.RESET))
        await learner.catch_up(store)
        document, speeds = state_of(learner)
        assert {name: document[name] for name in ("Q", "n", "M2", "ledger")} == {
            name: fresh[0][name] for name in ("Q", "n", "M2", "ledger")
        }
        assert speeds == fresh[1]
        await store.commit(outcome(0, 0, 2.0), table_import(exported("there", [(0, 0, 3.0)])))
        await learner.catch_up(store)
        assert learner.table.visits(StateKey(0, 0, 0, 0), ACTIONS[0]) == 2

    asyncio.run(story())


def test_two_coordinators_that_import_from_each_other_have_one_table(tmp_path: Path) -> None:
    async def story() -> None:
        stores = {name: MemoryStore() for name in ("a", "b")}
        learners = {name: Learner(tmp_path / name / "qtable.json", origin=name) for name in stores}
        for name, factor in (("a", 2.0), ("b", 0.5)):
            await stores[name].commit(*(outcome(0, 0, factor + step / 7) for step in range(5)))
            await learners[name].catch_up(stores[name])
        exports = {name: json.dumps(snapshot.document(each.table, each.ledger)) for name, each in learners.items()}
        for name, other in (("a", "b"), ("b", "a"), ("a", "b")):
            await stores[name].commit(table_import(snapshot.parse(exports[other])[0]))
            await learners[name].catch_up(stores[name])
        assert np.array_equal(learners["a"].table.residual(), learners["b"].table.residual())
        assert learners["a"].table.visits(StateKey(0, 0, 0, 0), ACTIONS[0]) == 10

    asyncio.run(story())


def test_a_table_of_another_cost_model_in_the_log_is_passed_over(tmp_path: Path) -> None:
    table = exported("there", [(0, 0, 3.0)])
    payload = qtable_events.table_import(table.contributions(), table.cost_model_version + 1, "x.json", "me")
    learner = Learner(tmp_path / "qtable.json")
    assert not learner.apply(1, qtable_events.IMPORT, payload)
    assert learner.table.last_seq == 1


def test_an_import_that_breaks_an_invariant_leaves_the_table_as_it_was(tmp_path: Path) -> None:
    table = exported("there", [(0, 0, 3.0)])
    payload = qtable_events.table_import(table.contributions(), table.cost_model_version, "x.json", "me")
    payload["contributions"]["zenith"] = {**payload["contributions"]["there"], "n": [-1.0]}
    learner = Learner(tmp_path / "qtable.json")
    assert not learner.apply(1, qtable_events.IMPORT, payload)
    assert "event 1 was passed over: ValueError" in learner.notes
    assert list(learner.table.parts) == [""]


def test_a_snapshot_of_another_log_is_not_taken_for_our_own(tmp_path: Path) -> None:
    snapshot.save(tmp_path / "qtable.json", exported("there", [(0, 0, 3.0)]), Ledger())
    learner = Learner(tmp_path / "qtable.json", origin="here")
    assert learner.table.n.sum() == 0
    assert "of another log" in learner.notes


def test_a_log_has_one_name_for_good() -> None:
    async def story() -> None:
        store = MemoryStore()
        name = await qtable_events.origin_of(store)
        assert name == await qtable_events.origin_of(store) != await qtable_events.origin_of(MemoryStore())
        assert load_prior().table("here").take(name, exported(name, [(0, 0, 2.0)]).contributions()[name])

    asyncio.run(story())


@pytest.mark.parametrize("kind", [qtable_events.IMPORT, qtable_events.RESET])
def test_both_kinds_are_read_by_the_learner(kind: str) -> None:
    assert kind in KINDS


def test_a_full_run_of_kills_that_missed_the_saves_has_failed() -> None:
    well: dict[str, float] = {"rounds": 200, "events": 9, "in a save": 20, "lost": 0, "differing": 0}
    assert failures(well) == failures({**well, "rounds": 3, "in a save": 0}) == []
    assert "only 19 kills" in failures({**well, "in a save": 19})[0]
    assert failures({**well, "lost": 1, "differing": 2}) == ["1 lost", "2 differing"]


def test_killed_while_it_saves_the_learner_loses_nothing() -> None:
    result = run(rounds=3, seed=1)
    assert result["events"] >= 3
    assert (result["lost"], result["differing"]) == (0, 0)
