"""The rows the coordinator makes durable: jobs, attempts, members, tokens and the event log.

A record is a frozen value. `version` counts the writes of a row and is set by the store alone; a caller sends back the
version it read and the store refuses the write when somebody was faster. Documents (`*_json`) are the UTF-8 JSON of
protos.documents, kept as bytes and never looked into by the store.
"""

from __future__ import annotations

from dataclasses import dataclass

from protos.errors import Blame
from protos.ids import Fence, JobId, NodeId
from protos.states import AttemptState, Eligibility, JobState, NodeLink, Reason

NO_FENCE = Fence(0)  # no generation was formed yet


@dataclass(frozen=True, slots=True)
class Job:
    job_id: JobId
    name: str
    owner: str
    state: JobState
    reason: Reason
    spec_json: bytes
    created_s: float  # Unix seconds, as every time here
    updated_s: float
    message: str = ""
    hint: str = ""
    blame: Blame | None = None
    exit_code: int | None = None
    code_json: bytes | None = None  # protos.artifact.Manifest
    data_json: bytes | None = None
    test_json: bytes | None = None
    weights_json: bytes | None = None
    profile_json: bytes | None = None
    plan_json: bytes | None = None
    fence: Fence = NO_FENCE  # of the newest generation; never falls
    retries: int = 0
    step: int = 0  # committed
    samples: int = 0  # committed
    strategy: str = ""
    checkpoint_json: bytes | None = None
    result_json: bytes | None = None
    idempotency_key: str | None = None
    started_s: float | None = None
    finished_s: float | None = None
    version: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One rank of one generation of a job."""

    job_id: JobId
    fence: Fence
    rank: int
    node_id: NodeId
    state: AttemptState
    created_s: float
    updated_s: float
    outcome_json: bytes | None = None  # protos.work.Outcome
    version: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """A node as it was last written down; heartbeats stay in memory."""

    node_id: NodeId
    name: str
    role: str
    link: NodeLink
    eligibility: Eligibility
    last_seen_s: float
    reason: str = ""
    capacity_json: bytes | None = None  # protos.capacity.Capacity
    left: bool = False
    version: int = 0


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A join token without its secret: only the hash is kept. `uses_left` None is unlimited."""

    token_id: str
    secret_hash: str
    role: str
    uses_left: int | None
    expires_s: float
    created_s: float
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the log. `chain` is the hash over the previous event's chain and this event (see store/chain.py)."""

    seq: int
    time_s: float
    kind: str
    job_id: JobId | None
    node_id: NodeId | None
    payload_json: bytes
    chain: str
