"""A running data-parallel group takes in a node that came, when that pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from control_bench import TIMING, Bench, plan_on, stops

from coordinator.control import events as e
from protos.ids import JobId, NodeId
from protos.plan import CostEstimate, Plan
from protos.states import Activity, AttemptState, JobState, Reason


@dataclass
class Growing(Bench):
    """All idle nodes train together; a step takes 1 s over the number of nodes."""

    steps: int = 1000
    strategy: str = "data_parallel"

    def plan_of(self, nodes: Sequence[NodeId], idle: tuple[NodeId, ...]) -> Plan:
        estimate = CostEstimate(1.0, 1.0 / len(idle), 1.0, {})
        strategy = self.strategy if len(idle) > 1 else "single_node"
        return replace(plan_on(idle), estimate=estimate, steps=self.steps, strategy=strategy)

    def ticking(self, seconds: float) -> list[e.Effect]:
        return self.wait(seconds, heard=tuple(self.state.nodes))


def running(**values: object) -> Growing:
    bench = Growing(**values)  # type: ignore[arg-type]
    bench.running("a", "b")
    bench.progress(5)
    return bench


def test_a_newcomer_joins_the_group_from_the_last_committed_step() -> None:
    bench = running()
    bench.connect("c")
    effects = bench.ticking(TIMING.grow_after_s + 1)
    assert stops(effects) == [("a", 1, "hold"), ("b", 1, "hold")]
    assert (bench.job().state, bench.job().reason, bench.job().message) == (
        JobState.RECOVERING,
        Reason.GROUP_GROWS,
        "c joins the group",
    )
    for rank in (0, 1):
        bench.fail(rank, held=7)
    assert bench.job().state is JobState.STARTING and bench.job().fence == 2  # at once: nothing went wrong
    assert [(node, fence) for node, fence, _ in bench.offers()] == [("a", 2), ("b", 2), ("c", 2)]
    assert bench.job().retries == 0 and set(bench.holders) == {"a", "b"}
    bench.ready()
    assert bench.job().state is JobState.RUNNING


def test_growth_uses_up_no_retries() -> None:
    bench = running()
    for node in ("c", "d", "e", "f", "g"):
        bench.connect(node)
        bench.ticking(TIMING.grow_after_s + TIMING.grow_every_s)
        for attempt in bench.job().attempts:
            bench.fail(attempt.rank, held=bench.job().step)
        bench.ready()
        bench.progress(bench.job().step + 1)
    assert len(bench.job().attempts) == 7 and bench.job().retries == 0


def test_a_job_that_shrank_to_one_node_grows_again_when_the_other_is_back() -> None:
    bench = running()
    bench.do(e.NodeControlled(NodeId("b"), "remove"))
    bench.size = 1
    bench.fail(0, held=7)
    bench.wait(3, heard=("a",))
    assert [attempt.node_id for attempt in bench.job().attempts] == ["a"] and bench.job().plan is not None
    bench.ready()
    bench.progress(8)
    bench.connect("b")
    assert stops(bench.ticking(TIMING.grow_after_s + 1)) == [("a", 2, "hold")]
    assert (bench.job().reason, bench.job().message) == (Reason.GROUP_GROWS, "b joins the group")
    bench.fail(0, held=9)
    assert [(node, fence) for node, fence, _ in bench.offers()] == [("a", 3), ("b", 3)]
    assert bench.holders == ("a",), "the state comes from the one that has it"


@pytest.mark.parametrize("steps", [12, 1000])
def test_a_job_on_one_node_grows_only_when_that_pays(steps: int) -> None:
    bench = Growing(steps=steps)
    bench.running("a")
    bench.progress(5)
    bench.connect("b")
    assert bool(stops(bench.ticking(30))) == (steps == 1000)


def test_a_job_whose_planner_keeps_it_on_one_node_stays_there() -> None:
    class Alone(Growing):
        def plan_of(self, nodes: Sequence[NodeId], idle: tuple[NodeId, ...]) -> Plan:
            faster = CostEstimate(1.0, 0.1 if "b" in idle else 1.0, 1.0, {})
            return replace(plan_on(idle[-1:]), estimate=faster, steps=self.steps)

    bench = Alone()
    bench.running("a")
    bench.progress(5)
    bench.connect("b")
    assert stops(bench.ticking(30)) == [], "a move to another node is no growth"


@pytest.mark.parametrize(
    "why",
    ["little is left", "another strategy", "paused newcomer", "a job waits", "no step since it was formed", "busy"],
)
def test_a_group_stays_as_it_is(why: str) -> None:
    bench = running(
        steps=12 if why == "little is left" else 1000,
        strategy="pipeline_parallel" if why == "another strategy" else "data_parallel",
    )
    if why == "no step since it was formed":
        bench = Growing()
        bench.running("a", "b")
    if why == "a job waits":
        bench.sizes["j-2"] = 4
        bench.submit("j-2")
    activity = {"paused newcomer": Activity.PAUSED, "busy": Activity.BUSY}.get(why, Activity.IDLE)
    bench.connect("c", activity=activity)
    assert stops(bench.ticking(30)) == []
    assert bench.job().state is JobState.RUNNING


def test_a_job_that_is_being_paused_does_not_grow() -> None:
    bench = running()
    bench.connect("c")
    bench.do(e.UserAsked(JobId("j-1"), "pause"))
    bench.ticking(TIMING.grow_after_s + 1)
    assert bench.job().reason is Reason.PAUSED_BY_USER
    for rank in (0, 1):
        bench.fail(rank, held=7)
    assert bench.job().state is JobState.PAUSED


def test_the_newcomer_may_be_gone_again_before_the_group_forms() -> None:
    bench = running()
    bench.connect("c")
    bench.ticking(TIMING.grow_after_s + 1)
    bench.do(e.NodeControlled(NodeId("c"), "remove"))
    for rank in (0, 1):
        bench.fail(rank, held=7)
    assert [attempt.node_id for attempt in bench.job().attempts] == ["a", "b"]
    bench.ready()
    assert all(attempt.state is AttemptState.READY for attempt in bench.job().attempts)


def test_one_that_would_hold_up_the_newcomer_is_left_out_and_it_is_said() -> None:
    class Choosy(Growing):
        """Never b beside c."""

        def plan_of(self, nodes: Sequence[NodeId], idle: tuple[NodeId, ...]) -> Plan:
            kept = tuple(node for node in idle if node != "b" or "c" not in idle)
            estimate = CostEstimate(1.0, 0.1 if "c" in kept else 0.5, 1.0, {})
            return replace(super().plan_of(nodes, kept), estimate=estimate)

    bench = Choosy()
    bench.running("a", "b")
    bench.progress(5)
    bench.connect("c")
    bench.ticking(TIMING.grow_after_s + 1)
    assert bench.job().message == "c joins the group, b is left out of it"
    for rank in (0, 1):
        bench.fail(rank, held=7)
    assert [attempt.node_id for attempt in bench.job().attempts] == ["a", "c"]
