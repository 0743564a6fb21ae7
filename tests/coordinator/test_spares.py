"""Plans made beforehand: who gets them, that a loss takes them, and that anything else is planned as it happens."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from test_placement import J, know, placement
from test_planner import GIB, LARGER_THAN_A_NODE, decide, node, stack

from coordinator.control.events import Unplaced
from coordinator.control.state import AttemptView, JobView, NodeStatus, State
from coordinator.placement import Placement
from coordinator.sessions import Session, Sessions
from coordinator.spares import AGAIN_S, SAID, among, keep_prepared, needs_spares
from protos.capacity import LinkEstimate
from protos.ids import NodeId
from protos.plan import Plan
from protos.states import Activity, AttemptState, JobState, NodeLink, StopMode
from strategies.cost import COST_MODEL_VERSION

A, B, C, D = (NodeId(name) for name in "abcd")
CUT = decide(*(node(name) for name in "abc"), profile=LARGER_THAN_A_NODE)
OUTCOME = {
    "counted": True, "cost_model_version": COST_MODEL_VERSION, "measured_step_s": 1.0, "ranks": [],
    "basis": {"work": "stage", "model": "m", "combination": "c"},
    "network": {"name": "192.168.1.0/24", "predicted_s": 1.0, "measured_s": 1.5},
}  # fmt: skip


def prepared(folder: Path) -> tuple[Placement, Sessions]:
    """The pipeline of three nodes runs, and its losses have been planned."""
    made, sessions = placement(folder, "a", "b", "c")
    know(made, LARGER_THAN_A_NODE)
    asyncio.run(made.prepare(J, CUT, (A, B, C), 0.0))
    return made, sessions


def goes_on(made: Placement, *nodes: NodeId, holders: tuple[NodeId, ...] = ()) -> Plan:
    placed = made.plan_for(J, nodes, nodes, holders or nodes, CUT.strategy)
    assert isinstance(placed, Plan), placed
    return placed


def test_a_lost_node_is_answered_with_the_plan_that_was_made_for_it(tmp_path: Path) -> None:
    made, _ = prepared(tmp_path)
    shown = {spare.lost: spare for spare in made.spares_of(J, CUT.id)}
    assert {tuple(sorted(lost)) for lost in shown} == {(A,), (B,), (C,), (A, B), (A, C), (B, C)}
    for lost, left in ((A, (B, C)), (B, (A, C)), (C, (A, B))):
        plan = goes_on(made, *left)
        assert plan.reason.endswith(SAID) and {subtask.node_id for subtask in plan.subtasks} == set(left)
        assert (shown[(lost,)].strategy, set(shown[(lost,)].nodes)) == (plan.strategy, set(left))
        assert shown[(lost,)].seconds == plan.estimate.seconds
        live, _ = placement(tmp_path, *left)
        know(live, LARGER_THAN_A_NODE)
        again = goes_on(live, *left)
        assert replace(plan, id=again.id, reason="") == replace(again, reason=""), "what a re-plan would give"
        assert plan.id != goes_on(made, *left).id


def test_a_loss_of_two_is_planned_too_and_one_that_nothing_survives_waits(tmp_path: Path) -> None:
    made, _ = prepared(tmp_path)
    shown = {spare.lost: spare for spare in made.spares_of(J, CUT.id)}
    assert {spare.strategy for lost, spare in shown.items() if len(lost) == 2} == {""}
    assert all("needs 2 usable nodes" in spare.reason for lost, spare in shown.items() if len(lost) == 2)
    waits = made.plan_for(J, (A,), (A,), (A,), CUT.strategy)
    assert isinstance(waits, Unplaced) and not waits.permanent
    fits = stack(8, 60_000_000)  # 7 GiB with Adam: two of four nodes hold it, and one nearly
    four = decide(*(node(name) for name in "abcd"), profile=fits, strategy="pipeline_parallel")
    other, _ = placement(tmp_path, "a", "b", "c", "d")
    know(other, fits, strategy="pipeline_parallel")
    asyncio.run(other.prepare(J, four, (A, B, C, D), 0.0))
    used = sorted({subtask.node_id for subtask in four.subtasks})
    left = tuple(sorted({A, B, C, D} - set(used[:2])))
    assert goes_on(other, *left).reason.endswith(SAID)


@pytest.mark.parametrize("what", ["memory", "speed", "link", "learned", "a newcomer", "no holder", "another strategy"])
def test_when_something_that_matters_has_changed_it_is_planned_anew(tmp_path: Path, what: str) -> None:
    made, sessions = prepared(tmp_path)
    nodes, holders, previous = (A, B), (A, B), CUT.strategy
    match what:
        case "memory":
            sessions[A].capacity = replace(sessions[A].capacity, memory_bytes=9 * GIB)
        case "speed":
            sessions[A].capacity = replace(sessions[A].capacity, families=node("a", 20.0).capacity.families)
        case "link":
            sessions.links[A, B] = LinkEstimate(0.01, 1e7, "192.168.1.0/24")
        case "learned":
            assert made._learner.speeds.apply(OUTCOME)
        case "a newcomer":
            sessions.add(Session(D, "d", "s", node("d").capacity))
            nodes = (A, B, D)
        case "no holder":
            holders = (C,)  # its newest state is with none of those that are left
        case "another strategy":
            previous = "model_parallel"
    placed = made.plan_for(J, nodes, nodes, holders, previous)
    assert isinstance(placed, Plan) and SAID not in placed.reason


def test_what_does_not_matter_to_a_plan_changes_nothing(tmp_path: Path) -> None:
    made, sessions = prepared(tmp_path)
    sessions[A].capacity = replace(sessions[A].capacity, disk_free_bytes=1, load=3.0, battery=0.5, user_idle_s=1.0)
    sessions.links[A, C] = LinkEstimate(0.01, 1e7, "192.168.1.0/24")  # of the node that is lost
    assert goes_on(made, A, B).reason.endswith(SAID)


def test_it_is_done_once_and_again_only_when_something_changed_and_not_at_once(tmp_path: Path) -> None:
    made, sessions = prepared(tmp_path)

    def again(now_s: float) -> bool:
        before = made.spares_of(J, CUT.id)
        asyncio.run(made.prepare(J, CUT, (A, B, C), now_s))
        return made.spares_of(J, CUT.id) is not before

    assert not again(2 * AGAIN_S)
    sessions[C].capacity = replace(sessions[C].capacity, memory_bytes=9 * GIB)
    assert not again(AGAIN_S - 1)
    assert again(AGAIN_S)
    made.forget(J)
    assert made.spares_of(J, CUT.id) == ()


def state_of(job: JobView, *idle: NodeId) -> State:
    nodes = {
        node_id: NodeStatus(node_id, node_id, NodeLink.CONNECTED, activity=Activity.IDLE)
        for node_id in (A, B, C, *idle)
    }
    return State(MappingProxyType(nodes), MappingProxyType({job.job_id: job}))


def running(plan: Plan | None = CUT, **changes: object) -> JobView:
    attempts = tuple(AttemptView(rank, node_id, AttemptState.RUNNING) for rank, node_id in enumerate((A, B, C)))
    job = JobView(J, 1, JobState.RUNNING, plan=plan, attempts=attempts)
    return replace(job, **changes)  # type: ignore[arg-type]


def test_running_jobs_whose_model_is_cut_get_them_and_no_others() -> None:
    assert needs_spares(running())
    whole = decide(node("a"), node("b"), strategy="data_parallel")
    for other in (running(None), running(whole), running(state=JobState.STARTING), running(wanted=StopMode.PAUSE)):
        assert not needs_spares(other)
    assert among(state_of(running(), D), running()) == (A, B, C, D)
    assert among(state_of(running(avoid=frozenset({D})), D), running(avoid=frozenset({D}))) == (A, B, C)
    gone = state_of(running()).with_node(NodeStatus(C, C, NodeLink.DISCONNECTED))
    assert among(gone, running()) == ()


def test_the_loop_goes_on_while_plans_are_made_in_a_thread(tmp_path: Path) -> None:
    made, _ = placement(tmp_path, "a", "b", "c")
    know(made, LARGER_THAN_A_NODE)

    async def main() -> int:
        turns = 0
        keeper = asyncio.create_task(keep_prepared(lambda: state_of(running()), made, lambda: 0.0))
        try:
            async with asyncio.timeout(30):
                while not made.spares_of(J, CUT.id):
                    await asyncio.sleep(0.01)
                    turns += 1
        finally:
            keeper.cancel()
            await asyncio.wait({keeper})
        return turns

    assert asyncio.run(main()) > 1


def test_a_question_of_a_person_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    made, _ = placement(tmp_path, *(f"n{number}" for number in range(8)))
    know(made, LARGER_THAN_A_NODE)
    known = made.known(J)
    assert known is not None

    async def main() -> tuple[int, Plan]:
        asked = asyncio.create_task(
            made.plan_now(known.submission, known.found, tuple(NodeId(f"n{number}") for number in range(8)))
        )
        turns = 0
        while not asked.done():
            await asyncio.sleep(0)
            turns += 1
        return turns, await asked

    turns, plan = asyncio.run(main())
    assert turns > 10 and plan.spares
