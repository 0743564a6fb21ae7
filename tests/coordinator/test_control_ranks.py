"""Several ranks of one generation on one node: a node with k granted GPUs is k attempts, lost and stopped together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from control_bench import TIMING, Bench, plan_on, stops
from test_decompose import plan, spec

from coordinator.control import events as e
from coordinator.decompose import Inputs, decompose
from protos.ids import Fence, JobId, NodeId
from protos.plan import Plan
from protos.states import Activity, AttemptState, JobState, Reason
from protos.work import HeldLease

JOB = JobId("j-1")
A, B = NodeId("a"), NodeId("b")


@dataclass
class Ranks(Bench):
    """Node a has two GPUs, every other one."""

    def plan_of(self, nodes: Sequence[NodeId], idle: tuple[NodeId, ...]) -> Plan:
        return plan_on([node for node in nodes for _ in range(2 if node == A else 1)])


def bench(*nodes: str) -> Ranks:
    made = Ranks()
    made.running(*(nodes or ("a", "b")))
    return made


def presented(made: Ranks, *ranks: tuple[int, AttemptState]) -> tuple[e.Effect, ...]:
    leases = tuple(HeldLease(JOB, Fence(1), rank, state) for rank, state in ranks)
    return made.do(e.NodeConnected(A, "a", Activity.BUSY, "", leases))


def test_every_rank_is_offered_and_the_node_is_busy_until_its_last_one_has_ended() -> None:
    made = Ranks()
    made.connect("a", "b")
    made.submit()
    assert made.offers() == [("a", 1, 0), ("a", 1, 1), ("b", 1, 2)]
    made.ready()
    assert made.job().state is JobState.RUNNING
    made.finish(0)
    assert A in made.state.busy()
    made.finish(1)
    assert A not in made.state.busy() and B in made.state.busy()
    made.finish(2)
    assert made.job().state is JobState.SUCCEEDED


def test_a_lost_node_loses_all_its_ranks_at_once() -> None:
    made = bench()
    effects = made.do(e.NodeLeft(A, False, "lid closed"))
    assert [attempt.state for attempt in made.job().attempts] == [
        AttemptState.LOST,
        AttemptState.LOST,
        AttemptState.READY,
    ]
    assert stops(effects) == [("b", 1, "hold")]
    assert made.job().state is JobState.RECOVERING


def test_one_lost_rank_stops_its_neighbour_on_the_same_node_too() -> None:
    made = bench()
    assert stops(made.fail(1, held=5)) == [("a", 1, "hold"), ("b", 1, "hold")]
    assert A in made.state.busy()


def test_the_node_holds_the_highest_step_of_its_ranks_whichever_reports_last() -> None:
    made = bench()
    made.fail(0, held=6)
    made.fail(1, held=5)
    made.fail(2, held=5)
    assert {held.node_id: held.step for held in made.job().held} == {A: 6, B: 5}
    made.wait(TIMING.backoff_s(0) + 0.1)
    assert (made.job().state, made.holders) == (JobState.STARTING, (A,))


def test_a_connection_that_comes_back_with_all_its_leases_changes_nothing() -> None:
    made = bench()
    made.do(e.NodeDisconnected(A))
    assert presented(made, (0, AttemptState.RUNNING), (1, AttemptState.RUNNING)) == ()
    assert made.job().state is JobState.RUNNING


def test_a_rank_that_is_not_presented_is_lost_alone_and_the_others_hold() -> None:
    made = bench()
    effects = presented(made, (0, AttemptState.RUNNING))
    assert [attempt.state is AttemptState.LOST for attempt in made.job().attempts] == [False, True, False]
    assert stops(effects) == [("a", 1, "hold"), ("b", 1, "hold")]


def test_a_rank_whose_offer_was_lost_on_the_way_is_offered_again_beside_the_one_that_came() -> None:
    made = Ranks()
    made.connect("a", "b")
    made.submit()
    made.report(0, AttemptState.ACCEPTED)
    assert presented(made, (0, AttemptState.ACCEPTED)) == (e.Offer(A, JOB, Fence(1), 1),)


def test_a_lease_that_has_ended_does_not_stop_its_neighbour() -> None:
    """1 rank 1 is done, the word that this is known is lost with the connection 2 the node presents both 3 a stop
    would reach rank 0, which still delivers."""
    made = bench()
    made.finish(1)
    effects = presented(made, (0, AttemptState.RUNNING), (1, AttemptState.DONE))
    assert effects == ()
    made.finish(0)
    made.finish(2)
    assert made.job().state is JobState.SUCCEEDED


@pytest.mark.parametrize(("action", "state"), [("cancel", JobState.CANCELLED), ("pause", JobState.PAUSED)])
def test_what_the_user_asks_for_waits_for_every_rank(action: str, state: JobState) -> None:
    made = bench("a")
    assert set(stops(made.do(e.UserAsked(JOB, action)))) == {("a", 1, action)}
    made.fail(0, held=5)
    assert made.job().state is not state
    made.fail(1, held=5)
    assert made.job().state is state


def test_a_silent_node_is_lost_with_all_its_ranks_and_the_rest_goes_on() -> None:
    made = bench()
    made.wait(TIMING.lease_ttl_s + 2.0, heard=("b",))
    assert [attempt.state is AttemptState.LOST for attempt in made.job().attempts] == [True, True, False]
    made.size = 1
    made.fail(2, held=5)
    made.wait(TIMING.backoff_s(0) + 0.1, heard=("b",))
    assert (made.job().state, made.job().reason) == (JobState.STARTING, Reason.RENDEZVOUS)
    assert [attempt.node_id for attempt in made.job().attempts] == [B]


def test_every_task_knows_how_many_ranks_share_its_node() -> None:
    cut = plan()
    alone = decompose(cut, spec(), JOB, Fence(1), Inputs())
    assert [task.ranks_here for task in alone] == [1, 1]
    together = plan_on([A, A, B])
    assert [task.ranks_here for task in decompose(together, spec(), JOB, Fence(1), Inputs())] == [2, 2, 1]
