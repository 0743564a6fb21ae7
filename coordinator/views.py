"""Records and state as the JSON documents of docs/json.md. Pure: nothing is read or decided here."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from coordinator.control.state import NodeStatus
from coordinator.records import Attempt, Job, TokenRecord
from protos import documents
from protos.capacity import Capacity, LinkEstimate
from protos.ids import NodeId
from protos.plan import Identification, NodeView, Plan
from protos.states import TERMINAL_JOB_STATES, JobState
from protos.version import SCHEMA
from protos.work import StepTimes

_WITHOUT_A_MESSAGE = {
    JobState.SUBMITTED: "submitted",
    JobState.QUEUED: "waits for its turn",
    JobState.RUNNING: "training",
}


STILL_S = 30.0
_MAX_LINKS = 5000
_MAX_APART = 20


def sentence(record: Job) -> str:
    """Where a job stands, in words."""
    return record.message or _WITHOUT_A_MESSAGE.get(record.state, "")


def _stillness(record: Job, now_s: float) -> str:
    """Training that hangs shows itself: the record of a running job changes with every progress."""
    still_s = now_s - record.updated_s
    return f"; no new step for {still_s:.0f} s" if record.state is JobState.RUNNING and still_s > STILL_S else ""


def document(**content: Any) -> bytes:
    return plain_json({"schema": SCHEMA, **content})


def plain_json(content: Any, indent: int | None = None) -> bytes:
    """JSON that every reader takes: a number that is none (a loss that left the rails) is null."""
    try:
        return json.dumps(content, allow_nan=False, default=str, indent=indent).encode()
    except ValueError:
        return json.dumps(_finite(content), allow_nan=False, default=str, indent=indent).encode()


def _finite(content: Any) -> Any:
    match content:
        case float() if not math.isfinite(content):
            return None
        case Mapping():
            return {key: _finite(value) for key, value in content.items()}
        case list() | tuple():
            return [_finite(value) for value in content]
        case _:
            return content


def node(
    view: NodeView | NodeStatus,
    capacity: Capacity | None,
    learned: Mapping[str, Any] | None = None,
    apart: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """`learned`: how many times longer than measured at joining it takes, by family and kind of work. `apart`: names of
    nodes with which it is in no group, and why."""
    activity = view.activity.value
    bandwidth = capacity.bandwidth_bytes_per_s if capacity else None
    return {
        "id": view.node_id,
        "name": view.name,
        "link": view.link.value,
        "eligibility": view.eligibility.value,
        "activity": activity,
        "reason": view.reason,
        "capacity": documents.plain(capacity) if capacity else None,
        "rtt_s": capacity.rtt_s if capacity else None,
        "bandwidth_mbps": None if bandwidth is None else bandwidth * 8 / 1e6,
        "learned": dict(learned or {}),
        "apart": [{"node": name, "why": why} for name, why in sorted((apart or {}).items())[:_MAX_APART]],
    }


def links(measured: Mapping[tuple[NodeId, NodeId], LinkEstimate]) -> list[dict[str, Any]]:
    """Pairs of connected nodes whose link was measured; at most so many as a message holds beside the nodes."""
    return [
        {
            "a": a,
            "b": b,
            "rtt_s": link.rtt_s,
            "bandwidth_mbps": link.bandwidth_bytes_per_s * 8 / 1e6,
            "network": link.network,
        }
        for (a, b), link in sorted(measured.items())[:_MAX_LINKS]
    ]


def plan(made: Plan, found: Identification | None, layers: int, names: Mapping[str, str]) -> dict[str, Any]:
    """At most so many layers: a model of thousands must still fit into one message. `names`: node id -> name."""
    used = {node_id for each in made.candidates for node_id in each.nodes}
    used |= {subtask.node_id for subtask in made.subtasks}
    return {"plan": documents.plain(made), **_planned_from(used, found, layers, names)}


def unplanned(
    candidates: Sequence[Mapping[str, Any]], found: Identification | None, layers: int, names: Mapping[str, str]
) -> dict[str, Any]:
    """Of a job without a plan: each strategy as it was considered, as coordinator/unplaced.py keeps it."""
    used = {node_id for each in candidates for node_id in each["nodes"]}
    return {"plan": None, "candidates": list(candidates), **_planned_from(used, found, layers, names)}


def _planned_from(
    nodes: Collection[str], found: Identification | None, layers: int, names: Mapping[str, str]
) -> dict[str, Any]:
    """The names of these nodes, the model and the data."""
    content: dict[str, Any] = {"names": {node_id: names[node_id] for node_id in sorted(nodes) if node_id in names}}
    if found is not None:
        content["model"] = model(found, layers)
        content["data"] = documents.plain(found.data)
    return content


def model(found: Identification, layers: int) -> dict[str, Any]:
    shown: dict[str, Any] = documents.plain(found.profile)
    if len(shown["layers"]) > layers:
        shown["layers_left_out"] = len(shown["layers"]) - layers
        shown["layers"] = shown["layers"][:layers]
    return shown


def job(
    record: Job, names: Mapping[str, str], progress: Mapping[str, Any] | None, now_s: float, seq: int
) -> dict[str, Any]:
    """`names`: node id -> name; `progress`: the payload of its newest progress event; `seq`: the last event counted."""
    result = json.loads(record.result_json) if record.result_json else {}
    nodes: Iterable[str] = ()
    if record.plan_json:
        nodes = dict.fromkeys(s["node_id"] for s in json.loads(record.plan_json)["subtasks"])
    progress = progress or result.get("progress") or {}
    metrics = result.get("metrics") or {
        key: progress[key] for key in ("loss", "accuracy", "samples_per_s") if progress.get(key) is not None
    }
    ended_s = record.finished_s if record.state in TERMINAL_JOB_STATES else now_s
    source = json.loads(record.spec_json).get("model", {})  # a record of another version may say less
    code = json.loads(record.code_json)["files"] if record.code_json else []
    seconds = None if record.started_s is None or ended_s is None else max(0.0, ended_s - record.started_s)
    return {
        "id": record.job_id,
        "name": record.name,
        "state": record.state.value,
        "reason": record.reason.value,
        "strategy": record.strategy,
        "nodes": [names.get(node_id, node_id) for node_id in nodes],
        "samples": record.samples,
        "seconds": seconds,
        "metrics": metrics,
        "artifacts": result.get("artifacts", []),
        "message": sentence(record) + _stillness(record, now_s),
        "hint": record.hint,
        "blame": record.blame.value if record.blame else None,
        "exit_code": record.exit_code,
        "step": record.step,
        "steps_total": progress.get("steps_total"),
        "epoch": progress.get("epoch"),
        "epochs_total": progress.get("epochs_total"),
        "fence": record.fence,
        "owner": record.owner,
        "submitted_s": record.created_s,
        "finished_s": record.finished_s,
        "last_lines": result.get("last_lines", []),
        "seq": seq,
        "model": {"source": source.get("source", ""), "args": source.get("args", {})},
        "code": [{"name": entry["path"], "digest": entry["digest"], "bytes": entry["bytes"]} for entry in code],
    }


def token(record: TokenRecord) -> dict[str, Any]:
    return {
        "id": record.token_id,
        "role": record.role,
        "uses_left": record.uses_left,
        "expires_s": record.expires_s,
        "revoked": record.revoked,
    }


def ranks(said: Iterable[tuple[int, NodeId, StepTimes]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """What each rank of a running group computes and waits in a step."""
    return [
        {
            "rank": rank,
            "node": names.get(node_id, node_id),
            "step_compute_s": times.step_compute_s,
            "step_wait_s": times.step_sync_s,
        }
        for rank, node_id, times in said
    ]


def attempts(rows: Iterable[Attempt], names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "fence": row.fence,
            "rank": row.rank,
            "node": names.get(row.node_id, row.node_id),
            "state": row.state.value,
            "outcome": json.loads(row.outcome_json) if row.outcome_json else None,
        }
        for row in rows
    ]
