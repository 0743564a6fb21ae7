"""What a choice looks like once the job ran: pure, over the `decision`, `trial` and `outcome` events of one job.

Owns the regret estimate: what was measured of the strategy that finished, less what the best other one of the last
decision was expected to take (its prediction, corrected by what was learned until then). Nobody ran that one: the
estimate is as good as its prediction, whose standard deviation stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from coordinator.learning import DECISION, LESSONS, OUTCOME


def hindsight(events: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """`events`: (kind, payload) in the order of the log. -> {"groups": [...], "regret": {...} or None}."""
    groups: list[dict[str, Any]] = []
    decision: Mapping[str, Any] = {}
    regret: dict[str, Any] | None = None
    for kind, payload in events:
        if kind == DECISION:
            decision = payload
        elif kind in LESSONS:
            groups.append(_group(kind, payload, decision))
            regret = _regret(payload, decision) if kind == OUTCOME else regret
    return {"groups": groups, "regret": regret}


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


def _regret(outcome: Mapping[str, Any], decision: Mapping[str, Any]) -> dict[str, Any] | None:
    """None when nothing was measured, or nothing else was possible."""
    others = [c for c in _candidates(decision) if c["strategy"] != outcome["strategy"]]
    if not outcome["counted"] or not others or decision.get("plan_id") != outcome["plan_id"]:
        return None
    expected_s = {c["strategy"]: _expected_s(c) for c in others}
    best = min(expected_s, key=lambda name: expected_s[name])
    return {
        "measured_s": outcome["measured_s"],
        "best_other": best,
        "best_other_s": expected_s[best],
        "deviation": next(c.get("deviation", 0.0) for c in others if c["strategy"] == best),
        "regret_s": max(0.0, outcome["measured_s"] - expected_s[best]),
    }


def _expected_s(candidate: Mapping[str, Any]) -> float:
    """Without losses of nodes: what was measured has none in it."""
    residual = 0.0 if candidate.get("measured") else float(candidate["residual"])
    return float(candidate["seconds"]) * float(candidate.get("survival", 1.0)) * math.exp(-residual)
