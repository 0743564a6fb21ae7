from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from bench.oracle import AUTO, CONTROL, SINGLE, Measured, Record, figures, line_of, recorded
from bench.oracle_jobs import MODELS, NETWORKS, OracleJob
from bench.report import Figure


def jobs() -> list[Measured]:
    """All of them, with `auto` at 1.05 of the best: two of three won by single_node, the others by one of two."""
    found = []
    for number, job in enumerate(OracleJob(network, model) for network in NETWORKS for model in MODELS):
        best = (SINGLE, SINGLE, "data_parallel", SINGLE, SINGLE, "pipeline_parallel")[number % 6]
        seconds = {name: [20.0] * 3 for name in (SINGLE, CONTROL, "data_parallel", "pipeline_parallel")}
        seconds[best] = [18.0] * 3
        if best == SINGLE:
            seconds[CONTROL] = [18.0] * 3
        found.append(Measured(job, seconds | {AUTO: [18.9, 18.0, 18.5]}, {"model_parallel": "no"}, [best] * 3, 1.0))
    return found


def figure(measured: list[Measured], part: str) -> Figure:
    (found,) = (each for each in figures(measured) if part in each.name)
    return found


def gates(measured: list[Measured]) -> dict[str, bool]:
    return {each.name: bool(each.passed) for each in figures(measured) if each.gate is not None}


def slow(measured: list[Measured], count: int, seconds: list[float]) -> list[Measured]:
    """The same, `auto` having taken `seconds` of the first `count` jobs."""
    changed = [replace(each, seconds=each.seconds | {AUTO: seconds}) for each in measured[:count]]
    return [*changed, *measured[count:]]


def test_a_choice_near_the_best_everywhere_passes_every_gate() -> None:
    passed = gates(jobs())
    assert len(passed) == 5
    assert all(passed.values()), passed


def test_two_of_21_jobs_may_be_far_from_the_best_and_three_may_not() -> None:
    far = [24.0, 24.0, 24.0]
    assert figure(slow(jobs(), 2, far), "share of jobs").passed is True
    assert figure(slow(jobs(), 3, far), "share of jobs").passed is False


def test_one_job_slower_than_the_best_single_node_fails() -> None:
    found = figure(slow(jobs(), 1, [19.0, 19.5, 19.0]), "best single node")
    assert (found.passed, found.note) == (False, jobs()[0].job.name)
    assert figure(slow(jobs(), 1, [18.0, 30.0, 18.5]), "best single node").passed is True  # one round of three


@pytest.mark.parametrize(("part", "others"), [("won by something else", 4), ("strategies that win", 0)])
def test_jobs_that_single_node_wins_prove_nothing(part: str, others: int) -> None:
    measured = jobs()
    assert figure(measured, part).passed is True
    won = [each for each in measured if each.winner != SINGLE]
    for each in won[others:]:
        each.seconds[SINGLE] = each.seconds[CONTROL] = [10.0] * 3
    assert figure(measured, part).passed is False


def test_two_strategies_that_win_are_too_few() -> None:
    measured = jobs()
    for each in measured:
        if each.winner == "pipeline_parallel":
            each.seconds["data_parallel"] = [17.5] * 3
    assert figure(measured, "won by something else").passed is True
    assert figure(measured, "strategies that win").passed is False


def test_fewer_than_20_jobs_are_too_few() -> None:
    assert gates(jobs()[:20])["jobs"]
    assert not gates(jobs()[:19])["jobs"]


def test_a_strategy_that_failed_in_two_rounds_wins_nothing_and_in_one_round_may() -> None:
    (first, *_) = jobs()
    first.seconds["data_parallel"] = [5.0, math.inf, 6.0]
    assert (first.winner, first.of_best) == ("data_parallel", 18.5 / 6.0)
    first.seconds["data_parallel"] = [5.0, math.inf, math.inf]
    assert first.winner == SINGLE


def test_gates_are_widened_by_what_two_equal_runs_differ_and_by_nothing_else() -> None:
    late = [20.5, 20.5, 20.5]  # 1.14 of single_node
    quiet, noisy = slow(jobs(), 3, late), slow(jobs(), 3, late)
    for each in noisy:
        each.seconds[CONTROL] = [1.2 * seconds for seconds in each.seconds[SINGLE]]
    for part in ("share of jobs", "best single node"):
        assert figure(quiet, part).passed is False
        assert figure(noisy, part).passed is True
    control = figure(noisy, "A/A control")
    assert control.high is not None
    assert control.high == pytest.approx(1.2)
    for each in noisy:
        each.seconds[CONTROL] = [seconds / 1.2 for seconds in each.seconds[SINGLE]]
    assert figure(noisy, "best single node").passed is True  # slower or quicker by chance is the same


def test_what_is_known_after_a_job_is_in_the_file_and_is_gone_on_from(tmp_path: Path) -> None:
    measured = jobs()[:2]
    measured[0].seconds["data_parallel"] = [5.0, math.inf, math.inf]
    record = Record(tmp_path / "oracle.json", measured, ["one job: FAILED"])
    record.save()
    content = json.loads(record.file.read_text())
    assert content["passed"] is False
    assert "one job" in content["benchmarks"][0]["error"]
    known = Record(record.file, recorded(content))
    assert known.measured == measured
    assert known.has(measured[0].job)
    assert not known.has(jobs()[2].job)
    assert [path.name for path in tmp_path.iterdir()] == ["oracle.json"]


def test_a_job_whose_model_has_changed_since_is_measured_again(tmp_path: Path) -> None:
    (first, second, *_) = jobs()
    changed = OracleJob(first.job.network, replace(first.job.model, steps=1))
    record = Record(tmp_path / "oracle.json", [replace(first, job=changed), second])
    record.save()
    assert recorded(json.loads(record.file.read_text())) == [second]


def test_a_job_that_other_formulas_chose_for_is_measured_again(tmp_path: Path) -> None:
    (first, second, *_) = jobs()
    record = Record(tmp_path / "oracle.json", [replace(first, cost_model=first.cost_model - 1), second])
    record.save()
    assert recorded(json.loads(record.file.read_text())) == [second]


def test_a_line_says_what_auto_took_the_best_the_winner_and_the_first_round() -> None:
    line = line_of(jobs()[2])
    for part in ("auto 18.5 s", "best 18.0 s (data_parallel)", "1.03 of the best", "first round 18.9 s: 1.05"):
        assert part in line
