from __future__ import annotations

import random
from dataclasses import replace

import pytest

from bench.sim_decisions import FULL, NODES, NOTHING, Decision, decisions, figures_of_decisions, fill, taught_by
from bench.sim_planner import after_jobs as learned_after
from bench.sim_planner import day_one, figures_after_jobs, figures_of_day_one
from bench.sim_play import Coordinator, Way, every_plan, job_s, oracle_s, play
from bench.sim_tables import Case, fixed, literal
from bench.sim_truth import Truth
from bench.sim_world import Job, World, fastest_flops, job, jobs, world
from coordinator.earlier_groups import as_placed
from coordinator.planner import plan
from coordinator.speeds import MOST_KEYS, Speeds
from protos.ids import PlanId
from qtable.state import StateKey

KEY = StateKey(0, 0, 0, 0)


def some(number: int, most: int = 4) -> tuple[World, Job]:
    found = world(f"test/{number}", most=most)
    return found, job(random.Random(number), fastest_flops(found))


def test_a_seed_is_a_world() -> None:
    one, other = world("test/1"), world("test/1")
    assert one.cluster == other.cluster
    assert one.errors["n0", "matmul", "single_node"] == other.errors["n0", "matmul", "single_node"]
    assert one.errors["n0", "matmul", "single_node"] != one.errors["n0", "matmul", "data_parallel"]
    assert world("test/2").cluster != one.cluster


def test_the_planner_sees_machines_about_as_they_are_but_not_exactly() -> None:
    ratios = []
    for number in range(20):
        found, one = some(number)
        plans, truth = every_plan(found, one), Truth(found, 0.0)
        ratios += [placed.cost.seconds / job_s(truth, one, name, placed) for name, placed in plans.best.items()]
    assert 0.6 < sorted(ratios)[len(ratios) // 2] < 1.4
    assert max(abs(ratio - 1) for ratio in ratios) > 0.05


def test_a_plan_takes_as_long_as_the_estimate_it_was_made_of() -> None:
    found, one = some(3)
    table = Coordinator().learner
    made = plan(
        one.spec, one.profile, one.data, found.cluster, table.table, random.Random(0), table.ledger, plan_id=PlanId("p")
    )
    placed, truth = every_plan(found, one).best[made.strategy], Truth(found, 0.25)
    assert truth.step(one, made.strategy, as_placed(made)) == truth.step(one, made.strategy, placed)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_nothing_is_better_than_the_oracle_and_the_same_seed_gives_the_same_course(number: int) -> None:
    found, one = some(number)
    truth = Truth(found, 0.25)
    best_s = oracle_s(truth, one, every_plan(found, one))
    first, again = (play(truth, one, Way.RESIDUAL, Coordinator(), random.Random(1)) for _ in range(2))
    assert (first.seconds, first.groups) == (again.seconds, again.groups)
    assert first.seconds >= best_s * (1 - 1e-9)


def test_a_coordinator_of_the_simulation_learns_as_the_real_one() -> None:
    found = world("test/5", most=3)
    known, truth = Coordinator(), Truth(found, 0.5)
    order = jobs(found, 6)
    for one in order:
        play(truth, one, Way.RESIDUAL, known, random.Random(0))
    assert len({id(one) for one in order}) <= known.learner.table.n.sum() < 6, "the same again teaches it nothing"
    assert known.learner.speeds.learned().steps
    assert known.learner.ledger.job_s > 0


def test_jobs_come_again() -> None:
    order = jobs(world("test/1"), 40)
    assert 10 < len({id(one) for one in order}) < 35


def test_the_literal_table_stays_behind_the_best_fixed_action() -> None:
    rng = random.Random(0)
    cases = []
    for _ in range(300):
        seconds = {"data_parallel": rng.uniform(20, 90), "single_node": rng.uniform(10, 30)}
        cases.append(Case(KEY, seconds, min(seconds.values())))
    assert sum(fixed(cases)) < sum(literal(cases, 1))
    assert all(regret >= 0 for regret in fixed(cases))


def test_the_figures_of_a_tiny_run_name_their_gates() -> None:
    runs, decided = day_one(0)
    assert {each.knowing for each in decided} == {NOTHING}
    figures = figures_of_day_one(runs)
    assert {str(figure.gate) for figure in figures if figure.gate} >= {"< 9", "< 2", "< 40", "= 0"}
    worlds = learned_after(0, 3)
    figures = figures_after_jobs(worlds, 3)
    assert {str(figure.gate) for figure in figures if figure.gate} >= {"< 2.5", "< 1.5", "< 4", ">= 2.5"}
    changes = {figure.name: figure for figure in figures if "trials and changes of plan" in figure.name}
    assert len(changes) == 3 and [str(each.gate) for each in changes.values() if each.gate] == ["< 1"]


def test_what_trials_and_changes_of_plan_cost_is_part_of_the_time_and_counted_apart() -> None:
    found, one = some(2)
    truth, steps = Truth(found, 0.5), one.spec.train.steps or 1
    once = play(truth, one, Way.RESIDUAL, Coordinator(), random.Random(1))
    assert (len(once.groups), once.looking_s) == (1, 0.0)
    course = next(
        course
        for number in range(40)
        for found, one in (some(number),)
        if (course := play(Truth(found, 0.5), one, Way.PROBES, Coordinator(), random.Random(1))).looking_s > 0
    )
    assert len(course.groups) > 1 and course.looking_s < course.seconds
    assert once.seconds > steps * once.groups[-1].step_s


def test_the_95th_percentile_of_day_one_is_gated_with_probes_and_without() -> None:
    runs, _ = day_one(0)
    tails = {figure.name: figure for figure in figures_of_day_one(runs) if figure.name.endswith("p95")}
    gated = {name for name, figure in tails.items() if str(figure.gate) == "< 40"}
    assert gated == {"day one, sigma 0.25: cost model only, p95", "day one, sigma 0.25: with probes, p95"}
    assert len(tails) == 6
    far = [replace(run, model=0.5) for run in runs]
    (cost_model,) = (
        each for each in figures_of_day_one(far) if each.name == "day one, sigma 0.25: cost model only, p95"
    )
    assert cost_model.passed is False


def test_a_full_table_holds_as_many_keys_of_each_kind_as_are_kept() -> None:
    speeds = Speeds()
    fill(speeds)
    learned = speeds.learned()
    assert len(learned.models) == len(learned.networks) == len(learned.steps) == MOST_KEYS
    assert len(learned.speeds) == MOST_KEYS // 2  # work and overhead are two keys of one


def test_decisions_are_timed_after_jobs_and_with_a_full_table() -> None:
    timed = decisions(0, 1, "test", timed=1)
    assert [each.knowing for each in timed] == [taught_by(1), FULL]
    assert all(each.seconds > 0 and each.nodes == NODES for each in timed)


@pytest.mark.parametrize(("stages", "limit_s"), [(False, 0.05), (True, 2.0)])
def test_a_slow_decision_fails_its_gate_whatever_was_learned(stages: bool, limit_s: float) -> None:
    for knowing in (NOTHING, taught_by(200), FULL):
        for seconds, passed in ((0.9 * limit_s, True), (1.1 * limit_s, False)):
            (figure,) = figures_of_decisions([Decision(seconds, NODES, stages, knowing)])
            assert figure.passed is passed
            assert knowing in figure.name
