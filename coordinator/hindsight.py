"""What the choices of one job look like once it ran: pure, over its `decision`, `trial`, `outcome` and `job` events.

Owns the regret estimate: what the job took less what the best other strategy of the last decision was expected to take
(its prediction, corrected by what was learned until then). Nobody ran that one: the estimate is as good as its
prediction, whose standard deviation stands beside it. What the job took is the time of the strategy that finished it,
what steps of groups before that took longer than its own, and the time in which one group gave way to the next. The
start of the last group stands for that of the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.learning import DECISION, KINDS_OF_A_JOB, LESSONS, OUTCOME
from protos.states import JobState, Reason

JOB = "job"
TOLD = (*KINDS_OF_A_JOB, JOB)
MOST_DECISIONS = 100  # that one message shows: a job that lost a node every hour has many
_SAID_OF_A_CANDIDATE = (
    "strategy", "feasible", "reasons", "nodes", "seconds", "deviation", "step_s", "bytes", "memory_bytes", "q",
    "residual", "visits", "survival", "measured",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Told:
    """One event of TOLD."""

    kind: str
    time_s: float
    payload: Mapping[str, Any]


def hindsight(events: Sequence[Told]) -> dict[str, Any]:
    """In the order of the log. -> {"decisions": [...], "groups": [...], "regret": {...} or None}, and how many
    decisions were left out: beyond MOST_DECISIONS the first one and the newest ones are shown."""
    decisions: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    decision: Mapping[str, Any] = {}
    regret: dict[str, Any] | None = None
    for event in events:
        if event.kind == DECISION:
            decision = event.payload
            decisions.append(_decision(event.payload))
        elif event.kind in LESSONS:
            if event.kind == OUTCOME:
                regret = _regret(event.payload, decision, groups, _switching_s(events))
            groups.append(_group(event.kind, event.payload, decision))
    left_out = max(0, len(decisions) - MOST_DECISIONS)
    shown = [*decisions[:1], *decisions[1 + left_out :]]
    return {"decisions": shown, "decisions_left_out": left_out, "groups": groups, "regret": regret}


def _switching_s(events: Iterable[Told]) -> float:
    """From when a group was told to give way until the next one ran; a pause between is the user's time."""
    total_s, since_s = 0.0, None
    for event in events:
        state, reason = event.payload.get("state"), event.payload.get("reason")
        if event.kind != JOB:
            continue
        if state == JobState.RECOVERING and reason == Reason.REPLANNED and since_s is None:
            since_s = event.time_s
        elif state == JobState.RUNNING and since_s is not None:
            total_s, since_s = total_s + max(0.0, event.time_s - since_s), None
        elif state == JobState.PAUSED:
            since_s = None
    return total_s


def _decision(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What is not there was written by an older version."""
    return {
        "plan_id": payload["plan_id"],
        "strategy": payload.get("strategy"),
        "reason": payload.get("reason", ""),
        "candidates": [
            {name: each.get(name) for name in _SAID_OF_A_CANDIDATE} for each in payload.get("candidates", ())
        ],
        "predicted_s": payload.get("predicted_s"),
        "expected_loss_s": payload.get("loss_if_wrong_s", 0.0),
        "propensity": payload.get("propensity"),
        "forced": payload.get("forced"),
        "explored": payload.get("explored"),
        "explored_loss_s": payload.get("expected_loss_s"),
        "state": payload.get("state"),
        "features": payload.get("features"),
        "cost_model_version": payload.get("cost_model_version"),
        "trials": list(payload.get("trials", ())),
        "trial_steps": payload.get("trial_steps", 0),
    }


def _group(kind: str, payload: Mapping[str, Any], decision: Mapping[str, Any]) -> dict[str, Any]:
    nodes: list[str] = next((c["nodes"] for c in _candidates(decision) if c["strategy"] == payload["strategy"]), [])
    return {
        "strategy": payload["strategy"],
        "nodes": list(dict.fromkeys(nodes)),
        "steps": payload["steps"],
        "predicted_step_s": payload["predicted_step_s"],
        "measured_step_s": payload["measured_step_s"],
        "counted": payload["counted"],
        "why": payload["why"],
        "finished": kind == OUTCOME,
    }


def _candidates(decision: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return [c for c in decision.get("candidates", ()) if c.get("seconds") is not None]


def _regret(
    outcome: Mapping[str, Any], decision: Mapping[str, Any], before: Iterable[Mapping[str, Any]], switching_s: float
) -> dict[str, Any] | None:
    """None when nothing was measured, or nothing else was possible. `before`: the groups that gave way."""
    others = [c for c in _candidates(decision) if c["strategy"] != outcome["strategy"]]
    if not outcome["counted"] or not others or decision.get("plan_id") != outcome["plan_id"]:
        return None
    expected_s = {c["strategy"]: _expected_s(c) for c in others}
    best = min(expected_s, key=lambda name: expected_s[name])
    longer_s = sum(
        group["steps"] * (group["measured_step_s"] - outcome["measured_step_s"])
        for group in before
        if group["measured_step_s"] > 0
    )
    return {
        "measured_s": outcome["measured_s"],
        "earlier_groups_s": longer_s,
        "switching_s": switching_s,
        "best_other": best,
        "best_other_s": expected_s[best],
        "deviation": next(c.get("deviation", 0.0) for c in others if c["strategy"] == best),
        "regret_s": max(0.0, outcome["measured_s"] + longer_s + switching_s - expected_s[best]),
    }


def _expected_s(candidate: Mapping[str, Any]) -> float:
    """Without losses of nodes: what was measured has none in it."""
    residual = 0.0 if candidate.get("measured") else float(candidate["residual"])
    return float(candidate["seconds"]) * float(candidate.get("survival", 1.0)) * math.exp(-residual)
