"""What is left of a job that has ended: metrics.jsonl, report.json, the result document and the outcome to learn from.

Built before the transaction that ends the job, so that whoever sees the end sees the result. Two of the artifacts are
made here; model.safetensors came from rank 0.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator import learning
from coordinator.comparison import compare
from coordinator.control.state import JobView
from coordinator.records import Attempt, Job
from coordinator.store.protocol import AppendEvent, Write
from coordinator.views import plain_json
from protos import documents
from protos.artifact import Artifact
from protos.ids import Digest, NodeId
from protos.states import AttemptState, JobState
from protos.version import SCHEMA, SOFTWARE
from protos.work import Metrics, Outcome, Usage

PutBlob = Callable[[bytes], Awaitable[Digest]]


@dataclass(frozen=True, slots=True)
class Result:
    document: bytes  # result_json of the record
    writes: tuple[Write, ...]


async def conclude(
    view: JobView,
    record: Job,
    attempts: Sequence[Attempt],
    metrics: Sequence[Mapping[str, Any]],
    names: Mapping[NodeId, str],
    progress: Mapping[str, Any] | None,
    put_blob: PutBlob,
    now_s: float,
    last_lines: tuple[str, ...] = (),
) -> Result:
    """The result of a job in a terminal state. Artifacts exist for whatever was trained, also when it was cut short.

    `last_lines`: the traceback of a job that ended before it had an attempt.
    """
    decoded = [(row, documents.decode(Outcome, row.outcome_json)) for row in attempts if row.outcome_json]
    last = [outcome for row, outcome in decoded if row.fence == view.fence]
    used = [(row, outcome.usage) for row, outcome in decoded if row.fence == view.fence and outcome.usage is not None]
    first = next((outcome for row, outcome in decoded if row.fence == view.fence and row.rank == 0), None)
    artifacts = list(first.artifacts) if first and first.state is AttemptState.DONE else []
    final = dict(first.metrics) if first else {}
    usages = [usage for _, usage in used]
    writes: list[Write] = []
    measured: dict[str, Any] | None = None
    if view.plan is not None and usages:
        seen = learning.measure(
            usages,
            [_metrics(line) for line in metrics if line["step"] > view.fence_step],
            finished=view.state is JobState.SUCCEEDED,
            generations=int(view.fence),
            ranks=[row.rank for row, _ in used],
        )
        outcome = learning.outcome_payload(view.plan, seen)
        writes.append(AppendEvent(learning.OUTCOME, record.job_id, None, outcome))
        measured = {
            "seconds": outcome["measured_s"],
            "step_s": seen.step_s,
            "bytes": sum(usage.bytes_sent for usage in usages),
            "memory_bytes": max(usage.peak_memory_bytes for usage in usages),
            "reward": outcome["reward"],
            "counted": outcome["counted"],
            "why": outcome["why"],
            "nodes": compare(view.plan, [(row.rank, usage) for row, usage in used], names, seen.step_s),
        }
    if metrics:
        lines = b"".join(plain_json(line) + b"\n" for line in metrics)
        artifacts.append(Artifact("metrics.jsonl", await put_blob(lines), len(lines)))
    if view.plan is not None:
        report = _report(view, record, decoded, names, final, measured, now_s)
        content = plain_json(report, indent=2) + b"\n"
        artifacts.append(Artifact("report.json", await put_blob(content), len(content)))
    faults = [outcome.fault for outcome in last if outcome.fault is not None]
    of_fault = next((fault.last_lines for fault in faults if fault.message == view.message), ())
    document = {
        "last_lines": list(last_lines or of_fault),
        "metrics": final,
        "artifacts": [documents.plain(artifact) for artifact in artifacts],
        "measured": measured,
        "progress": dict(progress or {}),
    }
    return Result(plain_json(document), tuple(writes))


def nothing_left(last_lines: Sequence[str]) -> Result:
    """Of a job about which nothing else can be said."""
    document: dict[str, Any] = {"metrics": {}, "artifacts": [], "measured": None, "progress": {}}
    document["last_lines"] = list(last_lines)
    return Result(plain_json(document), ())


def _metrics(line: Mapping[str, Any]) -> Metrics:
    return Metrics(**{key: line.get(key) for key in Metrics.__dataclass_fields__})  # type: ignore[arg-type]


def _report(
    view: JobView,
    record: Job,
    decoded: Iterable[tuple[Attempt, Outcome]],
    names: Mapping[NodeId, str],
    final: Mapping[str, float],
    measured: Mapping[str, Any] | None,
    now_s: float,
) -> dict[str, Any]:
    assert view.plan is not None  # the caller looked
    per_node: dict[str, list[tuple[Attempt, Usage]]] = {}
    for row, outcome in decoded:
        if outcome.usage is not None:
            per_node.setdefault(names.get(row.node_id, row.node_id), []).append((row, outcome.usage))
    return {
        "schema": SCHEMA,
        "software": SOFTWARE,
        "job": {
            "id": record.job_id,
            "name": record.name,
            "state": view.state.value,
            "reason": view.reason.value,
            "message": view.message,
            "samples": view.samples,
            "steps": view.step,
            "generations": view.fence,
        },
        "times": {
            "submitted": record.created_s,
            "started": record.started_s,
            "finished": now_s,
            "seconds": None if record.started_s is None else now_s - record.started_s,
        },
        "plan": documents.plain(view.plan),
        "measured": measured,
        "nodes": {
            name: {
                **((measured or {}).get("nodes") or {}).get(name, {"predicted": None, "measured": None}),
                "samples": sum(usage.samples for _, usage in used),
                "steps": _steps(used),
                "bytes_sent": sum(usage.bytes_sent for _, usage in used),
                "peak_memory_bytes": max(usage.peak_memory_bytes for _, usage in used),
                "compute_s": sum(usage.compute_s for _, usage in used),
                "sync_s": sum(usage.sync_s for _, usage in used),
                "attempts": [{"fence": row.fence, "rank": row.rank, **documents.plain(usage)} for row, usage in used],
            }
            for name, used in sorted(per_node.items())
        },
        "attempts": [
            {
                "fence": row.fence,
                "rank": row.rank,
                "node": names.get(row.node_id, row.node_id),
                "state": row.state.value,
                "fault": documents.plain(outcome.fault) if outcome.fault else None,
            }
            for row, outcome in decoded
        ],
        "metrics": dict(final),
        "spec": json.loads(record.spec_json),
    }


def _steps(used: Iterable[tuple[Attempt, Usage]]) -> int:
    """Several ranks of a node take each step together: counted once per generation."""
    by_fence: dict[int, int] = {}
    for row, usage in used:
        by_fence[row.fence] = max(usage.steps, by_fence.get(row.fence, 0))
    return sum(by_fence.values())
