"""A submit request, decoded and checked: the spec and the manifests of what travels with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.records import Job
from protos import documents, jobspec, limits
from protos.artifact import Manifest, check_manifest
from protos.errors import SpecError
from protos.gen import jobs_pb2
from protos.ids import Fence, JobId
from protos.jobspec import JobSpec
from protos.work import Task, TaskKind
from strategies.data.source import MODEL_ALONE

_MAX_BYTES = limits.MAX_DOCUMENT_BYTES - 256 * 1024  # all of it travels in one document: an offer, with a checkpoint


@dataclass(frozen=True, slots=True)
class Submission:
    spec: JobSpec
    code: Manifest | None
    data: Manifest | None
    test: Manifest | None
    weights: Manifest | None

    @property
    def manifests(self) -> Mapping[str, Manifest]:
        every = {"code": self.code, "data": self.data, "test": self.test, "weights": self.weights}
        return {name: manifest for name, manifest in every.items() if manifest is not None}

    @property
    def key(self) -> str:
        """Equal for submissions that build the same model on the same data."""
        parts = [f"{name}:{manifest.digest}" for name, manifest in self.manifests.items()]
        # the name does not change what is identified; the strategy does: it decides whether places for cuts are sought
        described = self.spec.model_copy(update={"name": "", "strategy_options": None})
        return "\n".join([jobspec.dump(described), *parts])

    def task(self, kind: TaskKind, job_id: JobId) -> Task:
        """A short task of one node about this submission, outside any group."""
        return Task(
            kind=kind,
            job_id=job_id,
            fence=Fence(0),
            rank=0,
            world_size=1,
            strategy="single_node",
            spec=self.spec,
            samples=(self.spec.train.batch_size,),
            code=self.code,
            data=self.data,
            test=self.test,
            weights=self.weights,
        )


def of_request(request: jobs_pb2.SubmitRequest) -> Submission:
    """Raises SpecError for a spec or a manifest that is not valid: the client's own check is not trusted."""
    parts = (request.spec_json, request.code_json, request.data_json, request.test_json, request.weights_json)
    if sum(len(part) for part in parts) > _MAX_BYTES:
        raise SpecError(
            f"the job and the lists of its files have over {_MAX_BYTES} bytes: a node could not be told about them",
            "put the data into fewer files",
        )
    return Submission(
        _spec(request.spec_json),
        _manifest(request.code_json),
        _manifest(request.data_json),
        _manifest(request.test_json),
        _manifest(request.weights_json),
    )


def of_model(request: jobs_pb2.IdentifyRequest) -> Submission:
    """A model alone, to be identified. Raises as of_request."""
    content = _json(request.model_json)
    spec = jobspec.parse({"name": "identify", "model": content, "data": {"source": MODEL_ALONE}})
    return Submission(spec, _manifest(request.code_json), None, None, _manifest(request.weights_json))


def of_record(record: Job) -> Submission:
    return Submission(
        _spec(record.spec_json),
        _manifest(record.code_json),
        _manifest(record.data_json),
        _manifest(record.test_json),
        _manifest(record.weights_json),
    )


def _spec(document: bytes) -> JobSpec:
    """JSON only: what YAML allows beside it (aliases that unfold without end) is for people's own files."""
    spec = jobspec.parse(_json(document))
    if spec.data.source == MODEL_ALONE:
        raise SpecError("a job needs data", "hive models identify looks at a model without any")
    return spec


def _json(document: bytes) -> Any:
    if len(document) > limits.MAX_JOB_SPEC_BYTES:
        raise SpecError(f"the job is over {limits.MAX_JOB_SPEC_BYTES} bytes", "put data into a file of its own")
    try:
        return json.loads(document)
    except (ValueError, RecursionError):
        raise SpecError("the job is not JSON", "is the client a different version?") from None


def _manifest(document: bytes | None) -> Manifest | None:
    if not document:
        return None
    manifest = check_manifest(documents.decode(Manifest, document))
    if not manifest.files:
        raise SpecError("a list of files that names none", "is the folder empty?")
    return manifest
