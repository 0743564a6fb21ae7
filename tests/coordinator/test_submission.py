"""A submit request, decoded and checked; equal submissions have equal keys."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coordinator.records import Job
from coordinator.submission import Submission, of_model, of_record, of_request
from protos import documents, jobspec, limits
from protos.artifact import FileEntry, Manifest, digest_bytes
from protos.errors import SpecError
from protos.gen import jobs_pb2
from protos.ids import JobId
from protos.states import JobState, Reason
from protos.work import Task, TaskKind
from strategies.data.source import MODEL_ALONE

SPEC: dict[str, Any] = {"name": "digits", "model": {"source": "model.py:build"}, "data": {"source": "train.npz"}}


def manifest(**files: bytes) -> Manifest:
    return Manifest(tuple(FileEntry(name, digest_bytes(content), len(content)) for name, content in files.items()))


def request(spec: dict[str, Any] | None = None, **parts: Manifest) -> jobs_pb2.SubmitRequest:
    encoded: dict[str, Any] = {f"{name}_json": documents.encode(part) for name, part in parts.items()}
    return jobs_pb2.SubmitRequest(spec_json=json.dumps(spec or SPEC).encode(), **encoded)


def test_a_model_alone_is_for_identification_and_never_a_job() -> None:
    model = json.dumps({"source": "net.py:build", "args": {"n": 3}}).encode()
    made = of_model(
        jobs_pb2.IdentifyRequest(model_json=model, code_json=documents.encode(manifest(net=b"def build()")))
    )
    assert (made.spec.model.source, made.spec.model.args, made.data) == ("net.py:build", {"n": 3}, None)
    assert made.spec.data.source == MODEL_ALONE and made.code is not None
    with pytest.raises(SpecError, match="a job needs data"):
        of_request(request({**SPEC, "data": {"source": MODEL_ALONE}}))
    for wrong in (b"", b"[", b"[]", b'{"source": 3}', b'{"source": "x", "more": 1}'):
        with pytest.raises(SpecError):
            of_model(jobs_pb2.IdentifyRequest(model_json=wrong))


def test_what_was_submitted_comes_back_from_the_record_as_it_was() -> None:
    made = of_request(request(code=manifest(model=b"def build(): ..."), data=manifest(train=b"rows")))
    record = Job(
        JobId("j-1"),
        "digits",
        "me",
        JobState.SUBMITTED,
        Reason.NONE,
        jobspec.dump(made.spec).encode(),
        1.0,
        1.0,
        code_json=documents.encode(made.code),
        data_json=documents.encode(made.data),
    )
    assert of_record(record) == made
    assert dict(made.manifests) == {"code": made.code, "data": made.data}
    task = made.task(TaskKind.IDENTIFY, JobId("j-1"))
    assert documents.decode(Task, documents.encode(task)) == task


def test_the_key_is_of_what_is_identified() -> None:
    first = of_request(request(code=manifest(model=b"one")))
    again = of_request(request({**SPEC, "name": "again"}, code=manifest(model=b"one")))
    assert again.key == first.key
    others: list[Submission] = [
        of_request(request(code=manifest(model=b"two"))),
        of_request(request(data=manifest(model=b"one"))),
        of_request(request({**SPEC, "strategy": "pipeline_parallel"}, code=first.code)),  # type: ignore[arg-type]
        of_request(request({**SPEC, "model": {"source": "model.py:build", "args": {"hidden": 1}}}, code=first.code)),  # type: ignore[arg-type]
    ]
    assert len({each.key for each in (first, *others)}) == 5


def test_a_submission_that_passes_fits_into_an_offer() -> None:
    """One that did not would end the session of every node it is offered to."""
    files = tuple(
        FileEntry(f"data/{number:06}.npy", digest_bytes(b"x"), 1, f"/lab/{number:06}.npy") for number in range(9_000)
    )
    made = of_request(request(data=Manifest(files)))
    assert len(documents.encode(made.task(TaskKind.TRAIN, JobId("j-1")))) < limits.MAX_DOCUMENT_BYTES
    with pytest.raises(SpecError, match="lists of its files"):
        of_request(request(data=Manifest(files), test=Manifest(files[:5000])))
