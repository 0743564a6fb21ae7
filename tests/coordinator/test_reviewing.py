"""When a running job is looked at again: what its steps take now, and what is different enough."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
from test_planner import DATA, job, model, node

from coordinator.learning import usual_step_s
from coordinator.planner import plan
from coordinator.review import Standing
from coordinator.reviewing import AGAIN_S, FREE_CHANGES, LATELY_S, Look, due, lately
from protos.capacity import LinkEstimate
from protos.ids import Fence, NodeId
from protos.plan import ClusterView, Plan
from protos.work import Metrics, StepTimes
from qtable.policy import Ledger
from qtable.prior import load_prior

PAIR = (NodeId("a"), NodeId("b"))
LINK = LinkEstimate(0.001, 1e8, "192.168.1.0/24")
VIEW = ClusterView((node("a"), node("b")), {PAIR: LINK})
PLAN = replace(plan(job(), model(10_000, 1e8), DATA, VIEW, load_prior().table(), random.Random(0), Ledger()), trials=())


def trained(steps_s: Iterable[float]) -> list[Metrics]:
    records = [Metrics(1000.0, 0, 0, "train", 0.5, 0)]
    for at, step_s in enumerate(steps_s, 1):
        records.append(Metrics(records[-1].time + step_s, at, 0, "train", 0.5, 32 * at))
    return records


def step_s(*steps_s: float) -> float:
    found = usual_step_s(lately(trained(steps_s)))
    assert found is not None
    return found


def test_a_link_that_became_slow_is_seen_within_three_steps_however_long_the_job_ran_before() -> None:
    assert step_s(*[2.0] * 500, *[20.0] * 3) == 20.0


@pytest.mark.parametrize(("usual_s", "slow_s"), [(2.0, 20.0), (2.0, 120.0), (20.0, 200.0)])
def test_one_slow_step_or_two_are_no_change(usual_s: float, slow_s: float) -> None:
    for slow in (1, 2):
        assert step_s(*[usual_s] * 50, *[slow_s] * slow) == usual_s
        assert step_s(*[usual_s] * 50, *[slow_s] * slow, usual_s) == usual_s


@pytest.mark.parametrize("slow_s", [0.5, 5.0, 60.0])
def test_a_checkpoint_between_many_quick_steps_is_no_change(slow_s: float) -> None:
    for after in (0, 1, 50):
        found = step_s(*[0.02] * 2000, slow_s, *[0.02] * after)
        assert found == pytest.approx(0.02, rel=0.05)


def test_quick_steps_that_became_slower_are_seen_before_a_minute_has_passed() -> None:
    assert step_s(*[0.02] * 5000, *[0.03] * int(0.6 * LATELY_S / 0.03)) == pytest.approx(0.03, rel=0.05)


def test_an_evaluation_is_neither_a_step_nor_part_of_what_is_looked_at() -> None:
    records = trained([2.0] * 40)
    last = records[-1]
    records.append(replace(last, time=last.time + 300.0, stage="evaluate"))
    records += [replace(last, time=last.time + 300.0 + 2 * more, step=40 + more) for more in (1, 2)]
    assert usual_step_s(lately(records)) == 2.0
    assert len(lately(records)) < len(records)


def test_a_few_records_are_all_there_is() -> None:
    records = trained([0.1] * 4)
    assert list(lately(records)) == records and not lately([])


def standing(step_s: float = 0.1, **more: object) -> Standing:
    made: Plan = more.pop("plan", PLAN)  # type: ignore[assignment]
    return replace(Standing(made, Fence(1), 100, 100, step_s), **more)  # type: ignore[arg-type]


def look(view: ClusterView = VIEW, **more: object) -> Look:
    return Look(0.0, standing(**more), view)  # type: ignore[arg-type]


def later(last: Look | None, now: Standing, view: ClusterView = VIEW, now_s: float = AGAIN_S + 1) -> bool:
    return due(last, now, view, now_s)


def linked(**values: object) -> ClusterView:
    return replace(VIEW, links={PAIR: replace(LINK, **values)})  # type: ignore[arg-type]


def test_the_first_time_is_due_and_the_same_again_is_not() -> None:
    assert later(None, standing())
    assert not later(look(), standing())


@pytest.mark.parametrize(("now_s", "expected"), [(0.14, True), (0.07, True), (0.12, False), (0.09, False)])
def test_a_step_that_is_another_by_more_than_a_third_is_due(now_s: float, expected: bool) -> None:
    assert later(look(), standing(now_s)) is expected
    assert not later(look(), standing(now_s), now_s=AGAIN_S / 2), "but not at once"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"bandwidth_bytes_per_s": 0.6e8}, True),
        ({"bandwidth_bytes_per_s": 1.4e8}, True),
        ({"bandwidth_bytes_per_s": 0.9e8}, False),
        ({"rtt_s": 0.003}, True),
        ({"rtt_s": 0.0015}, False),
        ({"network": "vpn"}, True),
    ],
)
def test_a_link_that_is_another_is_due(values: dict[str, object], expected: bool) -> None:
    assert later(look(), standing(), linked(**values)) is expected


def test_a_node_that_came_or_has_other_grants_is_due_and_load_and_free_disk_are_not() -> None:
    a, b = VIEW.nodes
    assert later(look(), standing(), replace(VIEW, nodes=(a, b, node("c"))))
    busy = replace(b, capacity=replace(b.capacity, load=7.5, disk_free_bytes=10**9))
    assert not later(look(), standing(), replace(VIEW, nodes=(a, busy)))
    less = replace(b, capacity=replace(b.capacity, cores=b.capacity.cores / 2))
    assert later(look(), standing(), replace(VIEW, nodes=(a, less)))


def test_what_was_decided_and_did_not_hold_is_asked_again() -> None:
    assert later(replace(look(), refused=True), standing())


def test_a_new_group_is_due_at_once_until_there_were_many() -> None:
    assert later(look(), standing(fence=Fence(2)), now_s=1.0)
    often = standing(fence=Fence(2), changes=FREE_CHANGES + 2)
    assert not later(look(), often, now_s=3 * AGAIN_S)
    assert later(look(), often, now_s=5 * AGAIN_S)


def test_a_trial_is_due_when_its_steps_are_made() -> None:
    tried = replace(PLAN, trials=("data_parallel", "single_node"), trial_steps=30)
    before = replace(look(), standing=standing(plan=tried, steps_here=20))
    assert not later(before, standing(plan=tried, steps_here=25), now_s=1.0)
    assert later(before, standing(plan=tried, steps_here=30), now_s=1.0)


def test_a_group_is_due_once_all_its_ranks_have_said_what_their_steps_take() -> None:
    made = plan(
        job(strategy="data_parallel"), model(10_000, 1e8), DATA, VIEW, load_prior().table(), random.Random(0), Ledger()
    )
    ranks = len(made.estimate.ranks)
    assert ranks == 2
    times = {number: StepTimes(0.05, 0.05, 0.05, 0.0) for number in range(ranks)}
    before = look(plan=made)
    assert not later(before, standing(plan=made, times={0: times[0]}))
    assert later(before, standing(plan=made, times=times))
    assert not later(look(plan=made, times=times), standing(plan=made, times=times))
