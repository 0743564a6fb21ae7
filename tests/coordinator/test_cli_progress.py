"""Progress of a job from its events, and what is printed of it."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.cli import follow, plan_view, render
from coordinator.cli.ending import exit_code
from coordinator.cli.progress import JobProgress
from coordinator.cli.progress_view import ProgressView
from coordinator.follow import EventRecord


def event(seq: int, time: float, kind: str, **payload: Any) -> EventRecord:
    return EventRecord(seq, time, kind, "j-1", "", payload)


def progress(seq: int, time: float, step: int, **payload: Any) -> EventRecord:
    facts = {"step": step, "steps_total": 100, "epochs_total": 2, "stage": "train", "rank": 0, "loss": 1.0}
    return event(seq, time, "progress", **{**facts, **payload})


def after(*events: EventRecord) -> JobProgress:
    here = JobProgress("j-1")
    for each in events:
        here = here.after(each)
    return here


def test_speed_and_time_left_come_from_the_times_of_the_events() -> None:
    here = after(event(1, 0.0, "job", state="RUNNING"), progress(2, 10.0, 10), progress(3, 11.0, 30))
    assert here.steps_per_s == 20.0
    assert here.eta_s == pytest.approx(70 / 20)


def test_the_time_a_job_stood_still_is_not_taken_for_slowness() -> None:
    here = after(
        progress(1, 0.0, 10),
        progress(2, 1.0, 20),
        event(3, 2.0, "job", state="RECOVERING"),
        event(4, 600.0, "job", state="RUNNING"),
        progress(5, 601.0, 30),
    )
    assert here.steps_per_s == 10.0


def test_steps_that_were_lost_do_not_give_a_negative_speed() -> None:
    here = after(progress(1, 0.0, 10), progress(2, 1.0, 20), progress(3, 2.0, 15), progress(4, 3.0, 25))
    assert here.steps_per_s == pytest.approx(10.0)
    assert here.step == 25


def test_the_epoch_is_counted_in_committed_steps() -> None:
    assert after(progress(1, 0.0, 0)).epoch_steps == (1, 0, 50)
    assert after(progress(1, 0.0, 50)).epoch_steps == (1, 50, 50)
    assert after(progress(1, 0.0, 51)).epoch_steps == (2, 1, 50)
    assert after(progress(1, 0.0, 100)).epoch_steps == (2, 50, 50)
    assert after(progress(1, 0.0, 5, epochs_total=None)).epoch_steps is None


def test_only_rank_0_counts_and_unknown_kinds_only_move_the_seq() -> None:
    here = after(progress(1, 0.0, 10), progress(2, 1.0, 99, rank=1), event(3, 2.0, "checkpoint", step=10))
    assert (here.step, here.seq) == (10, 3)


def test_figures_leave_out_what_is_not_known() -> None:
    assert after(progress(1, 0.0, 1, loss=None)).figures == ""
    assert after(progress(1, 0.0, 1, loss=0.5, accuracy=0.25, samples_per_s=812.3)).figures == (
        "loss 0.5  accuracy 0.25  812 samples/s"
    )


def test_in_a_pipe_each_stage_and_epoch_is_a_line_and_stdout_stays_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressView("j-1") as view:
        view.take(event(1, 0.0, "job", state="QUEUED", message="waiting for nodes"))
        view.take(event(2, 0.5, "job", state="RUNNING", message="training"))
        view.take(progress(3, 1.0, 1))
        view.take(progress(4, 1.2, 2))  # too soon for another line
        view.take(progress(5, 7.0, 40))
        view.take(progress(6, 7.1, 50, stage="evaluate"))
        view.take(progress(7, 7.2, 60))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.partition("  ")[0] for line in captured.err.splitlines()] == [
        "queued: waiting for nodes",
        "train epoch 1/2",
        "train epoch 1/2",
        "evaluate epoch 1/2",
        "train epoch 2/2",
    ]


@pytest.mark.parametrize(
    ("state", "reason", "code"),
    [
        ("SUCCEEDED", "finished", 0),
        ("FAILED", "user_code", 100),
        ("FAILED", "not_a_number", 100),
        ("FAILED", "model_unusable", 3),
        ("FAILED", "data_unusable", 3),
        ("FAILED", "no_placement", 7),
        ("CANCELLED", "cancelled_by_user", 103),
    ],
)
def test_how_a_job_ended_is_the_exit_code(state: str, reason: str, code: int) -> None:
    assert exit_code({"state": state, "reason": reason}) == code


def test_a_job_is_shown_without_what_it_does_not_have() -> None:
    text = render.job({"id": "j-1", "name": "mlp", "state": "FAILED", "reason": "user_code", "message": "it broke",
                       "hint": "fix it", "blame": "user_code", "metrics": {"loss": 0.25}, "artifacts": []})  # fmt: skip
    assert text.splitlines() == [
        "job      j-1  mlp",
        "state    FAILED (user_code)",
        "message  it broke",
        "hint     fix it",
        "blame    user_code",
        "loss     0.25",
    ]


def test_a_plan_shows_why_a_candidate_was_dropped_and_marks_the_choice() -> None:
    text = plan_view.plan(
        {
            "id": "p-1",
            "strategy": "single_node",
            "reason": "fastest",
            "candidates": [
                {"strategy": "single_node", "feasible": True, "reasons": [], "nodes": ["n-1"], "seconds": 90.0,
                 "step_s": 0.002, "bytes": 0, "memory_bytes": 2**20, "q": -0.5, "visits": 3},
                {"strategy": "data_parallel", "feasible": False, "reasons": ["no trusted link"], "nodes": []},
            ],
            "subtasks": [{"rank": 0, "type": "train", "node_id": "n-1", "data_range": [0, 64], "layer_range": [0, 3],
                          "synchronization": "none", "accumulate": 1}],
            "coordination_plan": {"rendezvous": "none", "deadline_s": 120, "retries": 3},
        },
        {"seconds": 100.0, "step_s": 0.0025, "counted": True},
    )  # fmt: skip
    assert "*single_node" in text
    assert "no trusted link" in text
    assert "0..64" in text
    assert "measured  seconds 1 min 40 s, step_s 2.5 ms" in text


def test_a_plan_of_stages_shows_the_cut_the_links_and_what_happens_without_a_node() -> None:
    stage = {"type": "train", "data_range": [0, 64], "accumulate": 8, "synchronization": "activations", "replica": 0}
    text = plan_view.plan(
        {
            "subtasks": [
                {**stage, "rank": 0, "node_id": "n-1", "layer_range": [0, 5], "stage": 0},
                {**stage, "rank": 1, "node_id": "n-2", "layer_range": [5, 9], "stage": 1},
            ],
            "layout": {"cut_after": ["h.4"], "stages": [[0, 5], [5, 9]]},
            "estimate": {"memory_bytes": {"n-1": 2**30, "n-2": 2**29}},
            "links": [{"a": "n-1", "b": "n-2", "bytes_per_step": 2**20, "seconds": 0.5}],
            "spares": [
                {"lost": ["n-1"], "strategy": "single_node", "nodes": ["n-2"], "seconds": 60.0, "reason": ""},
                {"lost": ["n-2"], "strategy": "", "nodes": [], "seconds": None, "reason": "needs 9 GiB"},
            ],
        }
    )
    assert "0..5 (to h.4)" in text and "5..9 (after h.4)" in text
    assert "train stage 1, replica 0" in text
    assert "1.0 GiB" in text and "512.0 MiB" in text
    assert "n-1 - n-2" in text and "1.0 MiB" in text and "500 ms" in text
    assert "if n-1 is lost: single_node on n-2, 1 min 00 s" in text
    assert "if n-2 is lost: waits (needs 9 GiB)" in text


def test_nothing_that_others_wrote_is_obeyed_by_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bad = "x\x1b[2J"
    shown = [
        render.job({"id": "j-1", "name": bad, "state": "FAILED", "reason": bad, "message": bad, "hint": bad,
                    "nodes": [bad], "last_lines": [bad], "metrics": {bad: 1.0}}),
        plan_view.plan({"id": bad, "strategy": bad, "reason": bad, "candidates": [{"strategy": bad, "reasons": [bad]}],
                     "coordination_plan": {"rendezvous": bad}}, {bad: 1.0}),
        render.model({"family": bad, "task": bad, "framework": bad, "format": bad}),
        render.checks([{"name": bad, "message": bad, "hint": bad, "ok": False}]),
        render.nodes([{"id": "n-1", "name": bad, "reason": bad, "link": bad}]),
        render.lan([{"name": bad, "address": bad, "join": bad}]),
        render.jobs([{"id": "j-1", "name": bad, "message": bad}]),
    ]  # fmt: skip
    with ProgressView("j-1") as view:
        view.take(event(1, 0.0, "job", state="QUEUED", message=bad))
        view.take(progress(2, 1.0, 1, stage=bad))
        view.say(bad)
    shown.append(capsys.readouterr().err)
    shown.append(follow._line(event(3, 0.0, "job", message=bad)))
    for text in shown:
        assert "x\\x1b[2J" in text and "\x1b" not in text


def test_documents_with_missing_fields_are_still_shown() -> None:
    assert render.nodes([{"id": "n-1", "capacity": None}]).splitlines()[1].startswith("n-1")
    assert render.jobs([{"id": "j-1"}]).splitlines()[1].startswith("j-1")
    assert plan_view.plan({})
    assert render.lan([]) and render.nodes([]) and render.jobs([])
