"""A gate judges the figure it is on; the table and the JSON document say the same."""

from __future__ import annotations

import json

import pytest

from bench.paired import Round, compare
from bench.report import Bound, Figure, Finding, Gate, document, markdown, ratio_figures, table


@pytest.mark.parametrize(
    ("gate", "value", "passes"),
    [
        (Gate(Bound.AT_LEAST, 0.97), 0.97, True),
        (Gate(Bound.AT_LEAST, 0.97), 0.9699, False),
        (Gate(Bound.BELOW, 150.0), 149.9, True),
        (Gate(Bound.BELOW, 150.0), 150.0, False),
        (Gate(Bound.EXACTLY, 0), 0, True),
        (Gate(Bound.EXACTLY, 0), 1, False),
    ],
)
def test_a_gate_is_kept_or_missed(gate: Gate, value: float, passes: bool) -> None:
    assert gate.passes(value) is passes


def test_a_finding_fails_with_its_first_missed_gate_and_only_then() -> None:
    printed_only = Figure("seconds", 99.0)
    kept, missed = Figure("lost", 0, gate=Gate(Bound.EXACTLY, 0)), Figure("lost", 1, gate=Gate(Bound.EXACTLY, 0))
    assert printed_only.passed is None
    assert Finding("store", (printed_only, kept)).passed
    assert not Finding("store", (printed_only, kept, missed)).passed


def test_a_ratio_comes_with_its_control_and_says_when_it_is_noisy() -> None:
    gate = Gate(Bound.AT_LEAST, 0.97)
    ratio, control = ratio_figures("CNN", compare([Round(100.0, 98.0, 100.0)] * 7), gate)
    assert (ratio.passed, control.passed, ratio.note) == (True, None, "")
    noisy, _ = ratio_figures("CNN", compare([Round(100.0, 98.0, 150.0)] * 7), gate)
    assert noisy.passed is False
    assert "noisy" in noisy.note


def test_table_and_document_say_the_same() -> None:
    ratio, control = ratio_figures("CNN", compare([Round(100.0, 96.0, 100.0)] * 7), Gate(Bound.AT_LEAST, 0.97))
    findings = (Finding("single_node", (ratio, control), {"runs": [1, 2]}, seconds=3.21),)
    lines = table(findings).splitlines()
    assert len(lines) == 4
    assert "0.960" in lines[2] and ">= 0.97" in lines[2] and "FAIL" in lines[2]
    assert "FAIL" not in lines[3] and "pass" not in lines[3]
    written = json.loads(json.dumps(document(findings, {"quick": False})))
    assert written["passed"] is False
    assert written["options"] == {"quick": False}
    benchmark = written["benchmarks"][0]
    assert (benchmark["name"], benchmark["detail"], benchmark["seconds"]) == ("single_node", {"runs": [1, 2]}, 3.2)
    assert benchmark["figures"][0]["gate"] == ">= 0.97"
    assert [figure["passed"] for figure in benchmark["figures"]] == [False, None]


def test_what_could_not_be_measured_has_not_passed() -> None:
    finding = Finding("heartbeats", (), error="AssertionError: the simulated nodes ended\nmore")
    assert not finding.passed
    line = table([finding]).splitlines()[2]
    assert "not measured" in line and "FAIL" in line and "more" not in line
    assert document([finding], {})["passed"] is False


def test_rows_of_markdown_say_whether_a_gate_is_met() -> None:
    figures = (
        Figure("seconds", 99.0, "s", 1.0, 200.0),
        Figure("lost", 0, gate=Gate(Bound.EXACTLY, 0)),
        Figure("regret", 3.0, "%", gate=Gate(Bound.BELOW, 2.0)),
    )
    lines = markdown(
        [Finding("all", figures), Finding("traces", (), error="not run: needs a folder\nmore")]
    ).splitlines()
    assert lines[2:] == [
        "| seconds | 99.000 s | 1.000 .. 200.000 |  |",
        "| lost | 0 |  | = 0, met |",
        "| regret | 3.000 % |  | < 2, **not met** |",
        "| traces | not measured | | not run: needs a folder |",
    ]
