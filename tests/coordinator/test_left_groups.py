"""A job whose link became slow leaves its group and does not take it back for what the group was before."""

from __future__ import annotations

from test_planner import DATA
from test_review import CLEAR, PAIR, started, taught

from coordinator.left_groups import HOLD_S, LeftGroups
from coordinator.review import Standing, Verdict, review
from protos.ids import Fence, JobId
from protos.plan import ClusterView, Learned
from qtable.prior import load_prior

JOB, OTHER = JobId("j-1"), JobId("j-2")


class Held(LeftGroups):
    """At a time that the test says."""

    now_s = 0.0

    def __init__(self) -> None:
        super().__init__(lambda: self.now_s)


def at(now_s: float, left: Held, learned: Learned, job_id: JobId = JOB) -> Verdict:
    """Of a job that runs on one node, having left the pair."""
    spec, alone = started(*PAIR, profile=CLEAR, strategy="single_node")
    standing = Standing(alone, Fence(2), 200, 100, alone.estimate.step_s, changes=1)
    left.now_s = now_s
    view = ClusterView(PAIR, learned=left.over(learned, job_id))
    free, _ = started(*PAIR, profile=CLEAR)
    assert spec.train == free.train
    return review(standing, free, CLEAR, DATA, view, load_prior().table())


def test_the_last_step_of_a_group_that_was_left_counts_for_that_job_and_not_for_ever() -> None:
    _, made = started(*PAIR, profile=CLEAR)
    assert made.strategy == "data_parallel"
    usually, left = taught(made, 1.0), Held()
    back = at(0.0, left, usually)
    assert back.plan is not None and back.plan.strategy == "data_parallel", "its lesson says that it is quick"
    left.note(JOB, made, 8 * made.estimate.step_s)
    assert at(HOLD_S - 1, left, usually).plan is None
    assert at(HOLD_S + 1, left, usually).plan is not None
    other = at(1.0, left, usually, OTHER)
    assert other.plan is not None, "another job knows nothing of it"


def test_what_is_left_again_is_held_for_twice_as_long() -> None:
    _, made = started(*PAIR, profile=CLEAR)
    usually, left = taught(made, 1.0), Held()
    for now_s in (0.0, 1000.0):
        left.now_s = now_s
        left.note(JOB, made, 8 * made.estimate.step_s)
    assert at(1000.0 + 2 * HOLD_S - 1, left, usually).plan is None
    assert at(1000.0 + 2 * HOLD_S + 1, left, usually).plan is not None


def test_ended_jobs_are_forgotten() -> None:
    _, made = started(*PAIR, profile=CLEAR)
    left = Held()
    left.note(JOB, made, 1.0)
    assert left.over(Learned(), JOB) != Learned()
    left.forget(JOB)
    assert left.over(Learned(), JOB) == Learned()


def test_a_job_knows_the_plans_of_the_groups_that_it_left_each_combination_once() -> None:
    _, made = started(*PAIR, profile=CLEAR)
    _, alone = started(*PAIR, profile=CLEAR, strategy="single_node")
    left = Held()
    for plan in (made, alone, made):
        left.note(JOB, plan, 1.0)
    assert left.plans(JOB) == (made, alone) and left.plans(OTHER) == ()
