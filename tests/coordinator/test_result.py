"""What is left of a job that ended: files, the document, and what is learnt from it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from control_bench import PEER_LOST, plan_on

from coordinator import learning
from coordinator.control.state import JobView
from coordinator.records import Attempt, Job
from coordinator.result import Result, conclude, nothing_left
from coordinator.store.protocol import AppendEvent
from protos import documents
from protos.artifact import Artifact, digest_bytes
from protos.errors import Blame
from protos.ids import Digest, Fence, JobId, NodeId
from protos.states import AttemptState, JobState, Reason
from protos.work import Fault, Metrics, Outcome, Usage

J = JobId("j-1")
RECORD = Job(J, "digits", "me", JobState.RUNNING, Reason.TRAINING, b'{"name": "digits"}', 1.0, 1.0, started_s=10.0)
MODEL = Artifact("model.safetensors", Digest("a" * 64), 100)
NODES = (NodeId("a"), NodeId("b"))


class Blobs:
    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    async def put(self, content: bytes) -> Digest:
        digest = digest_bytes(content)
        self.kept[digest] = content
        return digest

    def named(self, result: Result, name: str) -> bytes:
        artifacts = json.loads(result.document)["artifacts"]
        return self.kept[next(artifact["digest"] for artifact in artifacts if artifact["name"] == name)]


def usage(samples: int) -> Usage:
    return Usage(samples, 10, 5.0, 4.0, 1.0, 1000, 10**8, 0.5)


def row(fence: int, rank: int, outcome: Outcome) -> Attempt:
    return Attempt(J, Fence(fence), rank, NODES[rank], outcome.state, 1.0, 1.0, documents.encode(outcome))


def view(state: JobState, fence: int = 1, message: str = "finished") -> JobView:
    return JobView(J, 1, state, Reason.FINISHED, message, fence=Fence(fence), step=10, samples=320, plan=plan_on(NODES))


def end(blobs: Blobs, job: JobView, rows: list[Attempt], metrics: list[Mapping[str, Any]] | None = None) -> Result:
    names = {NODES[0]: "gaming-pc", NODES[1]: "laptop"}
    return asyncio.run(conclude(job, RECORD, rows, metrics or [], names, None, blobs.put, 20.0))


def line(step: int, loss: float) -> dict[str, Any]:
    shown: dict[str, Any] = documents.plain(Metrics(float(step), step, 0, "train", loss, 32 * step))
    return shown


def test_a_job_that_succeeded_leaves_model_metrics_and_a_report_of_who_did_what() -> None:
    blobs = Blobs()
    done = Outcome(AttemptState.DONE, 10, 320, {"loss": 0.1}, (MODEL,), usage(200))
    rows = [row(1, 0, done), row(1, 1, Outcome(AttemptState.DONE, 10, 320, usage=usage(120)))]
    result = end(blobs, view(JobState.SUCCEEDED), rows, [line(n, 1 / n) for n in range(1, 11)])
    document = json.loads(result.document)
    assert [artifact["name"] for artifact in document["artifacts"]] == [
        "model.safetensors",
        "metrics.jsonl",
        "report.json",
    ]
    assert document["metrics"] == {"loss": 0.1} and document["measured"]["bytes"] == 2000
    assert len(blobs.named(result, "metrics.jsonl").splitlines()) == 10
    report = json.loads(blobs.named(result, "report.json"))
    assert {name: node["samples"] for name, node in report["nodes"].items()} == {"gaming-pc": 200, "laptop": 120}
    assert report["times"]["seconds"] == 10.0 and report["job"]["samples"] == 320
    assert [write.kind for write in result.writes if isinstance(write, AppendEvent)] == [learning.OUTCOME]


def test_samples_of_every_generation_are_counted_in_the_report() -> None:
    blobs = Blobs()
    lost = Outcome(AttemptState.FAILED, 5, 160, usage=usage(80), fault=PEER_LOST)
    rows = [row(1, 0, lost), row(1, 1, Outcome(AttemptState.FAILED, fault=PEER_LOST))]
    rows.append(row(2, 0, Outcome(AttemptState.DONE, 10, 320, {"loss": 0.1}, (MODEL,), usage(240))))
    result = end(blobs, view(JobState.SUCCEEDED, 2), rows)
    report = json.loads(blobs.named(result, "report.json"))
    assert report["nodes"]["gaming-pc"]["samples"] == 320
    assert [(a["fence"], a["rank"], a["state"]) for a in report["attempts"]] == [
        (1, 0, "FAILED"),
        (1, 1, "FAILED"),
        (2, 0, "DONE"),
    ]


def test_a_job_that_failed_shows_the_lines_of_the_fault_it_failed_with() -> None:
    fault = Fault(Reason.USER_CODE, Blame.USER_CODE, "ValueError: shapes", last_lines=("Traceback", "ValueError"))
    rows = [
        row(1, 0, Outcome(AttemptState.FAILED, fault=fault)),
        row(1, 1, Outcome(AttemptState.FAILED, fault=PEER_LOST)),
    ]
    document = json.loads(end(Blobs(), view(JobState.FAILED, message=fault.message), rows).document)
    assert document["last_lines"] == ["Traceback", "ValueError"]
    assert [artifact["name"] for artifact in document["artifacts"]] == ["report.json"]


def test_numbers_that_are_none_leave_no_file_that_others_cannot_read() -> None:
    blobs = Blobs()
    nan = float("nan")
    done = Outcome(AttemptState.DONE, 10, 320, {"loss": 0.5}, (MODEL,), usage(320))
    result = end(blobs, view(JobState.SUCCEEDED), [row(1, 0, done)], [line(1, 1.0), {**line(2, 1.0), "loss": nan}])

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for content in (
        result.document,
        blobs.named(result, "report.json"),
        *blobs.named(result, "metrics.jsonl").split(b"\n"),
    ):
        if content:
            json.loads(content, parse_constant=refuse)


def test_a_job_that_never_ran_leaves_nothing_but_its_reason() -> None:
    job = JobView(J, 1, JobState.CANCELLED, Reason.CANCELLED_BY_USER, "cancelled before it ran")
    document = json.loads(end(Blobs(), job, []).document)
    assert document["artifacts"] == [] and document["measured"] is None
    assert json.loads(nothing_left(["a", "b"]).document)["last_lines"] == ["a", "b"]
