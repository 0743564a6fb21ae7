"""Decisions and what came of them, read from the log: as lines to take away, and as a judgement of the learning.

A decision and the outcomes of its plan share a plan id. Refuses to guess: what another version wrote is left out of the
judgement, and goes out as it is with the lines.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from coordinator.learning import DECISION, LESSONS, Learner, of_remembered
from coordinator.qtable_replay import replay
from coordinator.records import Event
from coordinator.store.protocol import Store
from qtable.backoff import residuals
from qtable.evaluate import Decided, Evaluation
from qtable.replay import key_of
from qtable.state import ACTIONS

_PAGE = 1000


async def lines(store: Store) -> AsyncIterator[dict[str, Any]]:
    """One object per decision, in the order of the log: features, mask, predictions, propensity, plan, and beside them
    what was measured of that plan (None while nothing was)."""
    outcomes = await _outcomes(store)
    after_seq = 0
    while page := await store.events(after_seq, None, (DECISION,), _PAGE):
        for event in page:
            payload = json.loads(event.payload_json)
            yield {
                "seq": event.seq,
                "time": event.time_s,
                "job_id": event.job_id,
                **payload,
                **_of_candidates(payload),
                "outcome": outcomes.get(payload.get("plan_id", "")),
            }
        after_seq = page[-1].seq


def _of_candidates(payload: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Empty for candidates of which another version says other things."""
    try:
        candidates = payload["candidates"]
        return {
            "mask": {each["strategy"]: each["reasons"] for each in candidates if not each["feasible"]},
            "predictions": {each["strategy"]: each["seconds"] for each in candidates if each["feasible"]},
        }
    except (KeyError, TypeError, AttributeError):
        return {"mask": {}, "predictions": {}}


async def _outcomes(store: Store) -> dict[str, dict[str, Any]]:
    """By plan id; of several the last."""
    found: dict[str, dict[str, Any]] = {}
    after_seq = 0
    while page := await store.events(after_seq, None, LESSONS, _PAGE):
        for event in page:
            payload = json.loads(event.payload_json)
            found[payload.get("plan_id", "")] = {"seq": event.seq, "time": event.time_s, "kind": event.kind, **payload}
        after_seq = page[-1].seq
    return found


async def evaluation(learner: Learner, store: Store) -> dict[str, Any]:
    """See qtable/evaluate.py. Every job counts with what the table had learned before it was planned."""
    tally = Evaluation()
    unread = 0

    def watch(event: Event, payload: Mapping[str, Any], made: Learner) -> None:
        nonlocal unread
        try:
            _watch(tally, event.kind, payload, made)
        except Exception:  # whatever a later version means by it
            unread += 1

    _, events = await replay(learner, store, learner.table.last_seq, watch)
    return {**tally.summary(), "events": events, "unread": unread}


def _watch(tally: Evaluation, kind: str, payload: Mapping[str, Any], made: Learner) -> None:
    if kind not in (DECISION, *LESSONS) or payload["cost_model_version"] != made.table.cost_model_version:
        return
    if kind == DECISION:
        of_actions = [each for each in payload["candidates"] if each["strategy"] in ACTIONS]  # and of no single node
        feasible = [each for each in of_actions if each["feasible"] and each["seconds"] is not None]
        learned = residuals(made.table, key_of(payload["state"]))
        corrections = {
            str(each["strategy"]): 0.0 if each.get("measured") else learned[str(each["strategy"])] for each in feasible
        }
        decided = Decided(
            {str(each["strategy"]): float(each["seconds"]) for each in feasible},
            corrections,
            str(payload["strategy"]),
            float(payload["propensity"]),
            bool(payload["forced"]),
        )
        tally.decide(str(payload["plan_id"]), decided)
    elif payload["counted"]:
        action = str(payload["strategy"])
        known = residuals(made.table, key_of(payload["state"]))[action]
        residual = 0.0 if of_remembered(payload) else known  # what was measured before is not corrected
        times = float(payload["predicted_s"]), float(payload["measured_s"])
        tally.finish(str(payload["plan_id"]), action, *times, residual)
