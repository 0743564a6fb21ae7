"""Between the scheduler's question and the planner's answer: what waits, what is refused, what breaks nobody else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_planner import DATA, GIB, job, model, node

from coordinator.cluster import Away, cluster_view
from coordinator.control.events import Unplaced
from coordinator.learning import Learner
from coordinator.placement import Placement
from coordinator.sessions import Session, Sessions
from coordinator.submission import Submission
from protos.capacity import FamilyRate
from protos.errors import NoPlacement
from protos.ids import JobId, NodeId
from protos.model import ModelProfile
from protos.plan import Identification, Plan
from protos.states import Reason

J = JobId("j-1")
A, B = NodeId("a"), NodeId("b")


def placement(folder: Path, *names: str, lan: bool = True, away: Sequence[Away] = ()) -> tuple[Placement, Sessions]:
    sessions = Sessions()
    for name in names:
        view = node(name, lan=lan)
        sessions.add(Session(view.node_id, name, "s", view.capacity))
    learner, nobody = Learner(folder / "q.json"), ("nobody is here", "start one")
    made = Placement(sessions, learner, random.Random(0), lambda: nobody, lambda: tuple(away))
    return made, sessions


def know(made: Placement, profile: ModelProfile | None = None, **parts: Any) -> None:
    found = Identification(profile or model(), DATA, {}, {})
    made.know(J, Submission(job(**parts), None, None, None, None), found)


def ask(made: Placement, idle: tuple[NodeId, ...], willing: tuple[NodeId, ...] | None = None) -> Plan | Unplaced:
    return made.plan_for(J, idle, willing or idle, (), None)


def test_nobody_here_waits_and_a_node_that_comes_gets_the_job(tmp_path: Path) -> None:
    made, _ = placement(tmp_path, "a")
    know(made)
    waiting = ask(made, ())
    assert isinstance(waiting, Unplaced)
    assert (waiting.message, waiting.permanent, waiting.reason) == ("nobody is here", False, Reason.WAITING_FOR_NODES)
    assert isinstance(ask(made, (A,)), Plan)
    with pytest.raises(NoPlacement, match="nobody is here"):
        known = made.known(J)
        assert known is not None
        asyncio.run(made.plan_now(known.submission, known.found, ()))


def test_too_few_nodes_waits_and_says_how_many_are_missing(tmp_path: Path) -> None:
    made, _ = placement(tmp_path, "a")
    know(made, strategy="data_parallel")
    waiting = ask(made, (A,))
    assert isinstance(waiting, Unplaced)
    assert (waiting.permanent, waiting.reason) == (False, Reason.WAITING_FOR_NODES)
    assert "needs 2 nodes, 1 take work" in waiting.message


def test_busy_nodes_are_waited_for_only_when_they_would_help(tmp_path: Path) -> None:
    made, _ = placement(tmp_path, "a", "b")
    know(made, strategy="data_parallel")
    waiting = ask(made, (A,), (A, B))
    assert isinstance(waiting, Unplaced)
    assert (waiting.permanent, waiting.reason) == (False, Reason.WAITING_FOR_BUSY_NODES)
    far, _ = placement(tmp_path, "a", "b", lan=False)
    know(far, strategy="data_parallel")
    refused = ask(far, (A, B))
    assert isinstance(refused, Unplaced) and refused.permanent and refused.reason is Reason.NO_PLACEMENT


@pytest.mark.parametrize("missing", ["the capacity it had", None])
def test_a_job_that_only_a_member_who_is_away_can_have_waits_for_it(tmp_path: Path, missing: str | None) -> None:
    """Just after a restart of the coordinator its nodes come back one after the other."""
    away = [Away(B, "b", "disconnected", node("b").capacity if missing else None)]
    made, _ = placement(tmp_path, "a", away=away)
    know(made, nodes={"require": {"names": ["b"]}})
    waiting = ask(made, (A,))
    assert isinstance(waiting, Unplaced)
    assert (waiting.permanent, waiting.reason) == (False, Reason.WAITING_FOR_NODES)
    assert "b is disconnected" in waiting.message
    away.clear()
    refused = ask(made, (A,))
    assert isinstance(refused, Unplaced) and refused.permanent and refused.reason is Reason.NO_PLACEMENT


def test_a_member_who_is_away_and_could_not_have_it_either_is_not_waited_for(tmp_path: Path) -> None:
    made, _ = placement(tmp_path, "a", away=[Away(B, "b", "paused by its owner", node("b").capacity)])
    know(made, nodes={"require": {"names": ["c"]}})
    refused = ask(made, (A,))
    assert isinstance(refused, Unplaced) and refused.permanent


def test_a_refusal_is_remembered_until_something_that_matters_changed(tmp_path: Path) -> None:
    made, sessions = placement(tmp_path, "a")
    large = replace(model(parameters=3 * 10**9), requirements=replace(model().requirements, memory_bytes=100 * GIB))
    know(made, large)
    first = ask(made, (A,))
    assert isinstance(first, Unplaced) and ask(made, (A,)) is first
    sessions[A].capacity = replace(sessions[A].capacity, memory_bytes=4096 * GIB, memory_total_bytes=4096 * GIB)
    assert isinstance(ask(made, (A,)), Plan)
    sessions[A].capacity = node("a").capacity
    assert isinstance(ask(made, (A,)), Unplaced)
    made.forget(J)
    assert made.known(J) is None


def test_a_group_that_is_left_once_its_job_is_forgotten_is_not_remembered(tmp_path: Path) -> None:
    """A review decides in a thread: the job may end, and be forgotten, meanwhile."""
    made, _ = placement(tmp_path, "a", "b")
    know(made)
    plan = ask(made, (A, B))
    assert isinstance(plan, Plan)
    usual = made.view((A, B)).learned
    made.left(J, plan, 7.0)
    assert 7.0 in made.view_for(J, (A, B)).learned.steps.values()
    made.forget(J)
    made.left(J, plan, 7.0)
    assert made.view_for(J, (A, B)).learned == usual


class Poisoned(dict[str, FamilyRate]):
    def items(self, *_: object) -> Any:
        raise ZeroDivisionError("a figure nobody thought of")

    get = __getitem__ = values = __iter__ = items  # type: ignore[assignment]


def test_a_job_the_planner_breaks_on_ends_with_the_reason_and_holds_up_nobody(tmp_path: Path) -> None:
    """An exception here would come up in every step of the control loop, for every job."""
    made, sessions = placement(tmp_path, "a")
    know(made)
    families: Mapping[str, FamilyRate] = Poisoned()
    sessions[A].capacity = replace(sessions[A].capacity, families=families)
    broken = ask(made, (A,))
    assert isinstance(broken, Unplaced) and broken.permanent and broken.reason is Reason.INTERNAL
    assert "ZeroDivisionError" in broken.message


def test_a_job_whose_records_are_of_another_version_ends_too(tmp_path: Path) -> None:
    made, _ = placement(tmp_path, "a")
    broken = ask(made, (A,))
    assert isinstance(broken, Unplaced) and broken.permanent and "cannot be read" in broken.message


def test_the_planner_sees_those_that_are_here_as_idle(tmp_path: Path) -> None:
    _, sessions = placement(tmp_path, "a", "b")
    view = cluster_view(sessions, (A, B, NodeId("gone")))
    assert [each.node_id for each in view.nodes] == [A, B] and all(each.usable for each in view.nodes)
