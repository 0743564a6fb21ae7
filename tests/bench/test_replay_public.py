from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from bench.replay_public import SETTINGS, left_out, main, predicted, replay, seconds_of, traces
from bench.replay_traces import Fit, Row, applications, error, fitted
from bench.report import Figure


def rows(found: Fit, placements: list[tuple[int, int]]) -> list[Row]:
    blank = [Row(nodes, replicas, batch, 1.0) for nodes, replicas in placements for batch in (8, 32, 128)]
    return [Row(row.nodes, row.replicas, row.local_batch, found.step_s(row)) for row in blank]


def test_a_fit_on_few_replicas_finds_what_many_take() -> None:
    hidden = Fit(0.02, 0.001, 0.005, 0.02, 0.03, 0.08, 2.0)
    few = rows(hidden, [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4), (3, 3), (4, 4)])
    many = rows(hidden, [(4, 8), (8, 8), (8, 16), (16, 64)])
    found = fitted(few)
    assert error(found, few) < 0.01
    assert error(found, many) < 0.05


def test_traces_are_read_from_a_folder(tmp_path: Path) -> None:
    hidden = Fit(0.02, 0.001, 0.005, 0.02, 0.03, 0.08, 2.0)
    folder = tmp_path / "bert"
    folder.mkdir()
    with (folder / "placements.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("placement", "local_bsz", "step_time", "sync_time"))
        for placement in ("1", "2", "4", "11", "12", "111", "1111", "44"):
            for batch in (8, 64):
                row = Row(len(placement), sum(map(int, placement)), batch, 1.0)
                writer.writerow((placement, batch, hidden.step_s(row), 0))
    with (folder / "scalability.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("num_nodes", "num_replicas", "local_bsz", "step_time", "sync_time"))
        writer.writerow((16, 64, 8, hidden.step_s(Row(16, 64, 8, 1.0)), 0))
    (found,) = applications(tmp_path)
    assert (found.name, found.rows, found.fitted) == ("bert", 17, 14)
    assert found.error < 0.1
    figures = {figure.name: figure for figure in traces(tmp_path).figures}
    assert figures["AdaptDL: the worst application"].passed
    assert figures["AdaptDL: rows read"].passed is False, "17 of 7,103"
    with pytest.raises(FileNotFoundError, match="simulator/traces"):
        applications(folder)


def test_the_hybrid_won_at_fp16_rates_only() -> None:
    """The winner hangs on how fast the GPUs are taken to be: with slower ones the pipeline's bubbles cost more."""
    fast, slow = (seconds_of(predicted(setting)) for setting in SETTINGS[:2])
    assert min(fast, key=lambda configuration: fast[configuration]) == (4, 4)
    assert min(slow, key=lambda configuration: slow[configuration]) == (16, 1)


def test_the_winners_that_are_claimed_are_gates_and_the_others_are_not() -> None:
    claimed = [setting for setting in SETTINGS if setting.claimed]
    assert [setting.name.split(",")[:2] for setting in claimed] == [
        ["AMP", " GPT-2"],
        ["Sailor", " OPT-350M"],
        ["Sailor", " GPT-Neo-2.7B"],
    ]
    for setting in SETTINGS:
        finding = replay(setting)
        assert [figure.passed for figure in finding.figures if figure.gate] == [True] * setting.claimed
        assert finding.passed


def judged(measured: dict[tuple[int, int], float], nodes: int) -> Figure:
    (setting,) = [each for each in SETTINGS if "OPT-350M" in each.name and each.nodes == nodes]
    return replay(replace(setting, measured=measured, claimed=True)).figures[-1]


def test_another_winner_than_the_predicted_one_fails_also_one_that_hive_cannot_run() -> None:
    lost = judged({(16, 1): 1.926, (8, 2): 1.9, (4, 4): 2.726}, 16)
    assert (lost.name.endswith("top-1 regret"), lost.passed) == (True, False)
    assert lost.value == pytest.approx(100 * (1.926 / 1.9 - 1))
    assert judged({(32, 1): 1.026, (16, 2): 1.0}, 32).passed is False


def test_a_setting_with_one_configuration_left_says_why_the_others_are_no_choice() -> None:
    (setting,) = [each for each in SETTINGS if each.nodes == 32]
    figures = replay(setting).figures
    assert "no choice to judge" in figures[-1].name
    out = [figure for figure in figures if figure.name.endswith("left out")]
    assert [figure.value for figure in out] == [1.225, 1.475]
    assert all("not predicted: " in figure.note and len(figure.note) > 40 for figure in out)


def test_what_was_measured_and_is_not_asked_is_a_row_with_its_reason() -> None:
    (tensor,) = [figure for figure in left_out().figures if "tensor" in figure.name]
    assert (tensor.value, tensor.unit, tensor.passed) == (1.55, "s", None)
    assert all(figure.note for figure in left_out().figures)


def test_a_run_without_the_traces_says_so_and_has_not_passed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not traces(None).passed
    monkeypatch.setattr("sys.argv", ["replay_public"])
    assert main() == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("traces")]
    assert "FAIL" in line
    assert "not run: needs --adaptdl FOLDER" in line
