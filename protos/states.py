"""States of jobs, attempts and nodes, and their transition tables as data.

The tables generate the diagram in docs/architecture.md, drive the property tests, and are checked by the store on every
write: a transition that is not here cannot be persisted.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class JobState(StrEnum):
    SUBMITTED = "SUBMITTED"
    PLANNING = "PLANNING"
    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    PAUSED = "PAUSED"
    STOPPING = "STOPPING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class AttemptState(StrEnum):
    OFFERED = "OFFERED"
    ACCEPTED = "ACCEPTED"
    READY = "READY"
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    LOST = "LOST"


class NodeLink(StrEnum):
    JOINING = "JOINING"
    CONNECTED = "CONNECTED"
    DISCONNECTED = "DISCONNECTED"
    LOST = "LOST"
    LEFT = "LEFT"


class Eligibility(StrEnum):
    OK = "OK"
    CORDONED = "CORDONED"
    DRAINING = "DRAINING"
    QUARANTINED = "QUARANTINED"


class Activity(StrEnum):
    IDLE = "IDLE"
    BUSY = "BUSY"
    PAUSED = "PAUSED"


class Reason(StrEnum):
    """Why a job is where it is: the closed list, shown beside a sentence."""

    NONE = "none"
    IDENTIFYING = "identifying"
    WAITING_FOR_NODES = "waiting_for_nodes"
    WAITING_FOR_BUSY_NODES = "waiting_for_busy_nodes"
    NO_PLACEMENT = "no_placement"
    RENDEZVOUS = "rendezvous"
    TRAINING = "training"
    NODE_LOST = "node_lost"
    NODE_LEFT = "node_left"
    PEER_LOST = "peer_lost"
    BACKING_OFF = "backing_off"
    RETRIES_EXHAUSTED = "retries_exhausted"
    PAUSED_BY_USER = "paused_by_user"
    CANCELLED_BY_USER = "cancelled_by_user"
    USER_CODE = "user_code"
    MODEL_UNUSABLE = "model_unusable"
    DATA_UNUSABLE = "data_unusable"
    NOT_A_NUMBER = "not_a_number"
    OUT_OF_MEMORY = "out_of_memory"
    DISK_FULL = "disk_full"
    COORDINATOR_RESTARTED = "coordinator_restarted"
    REPLANNED = "replanned"
    FINISHED = "finished"
    INTERNAL = "internal"


class StopMode(StrEnum):
    """How a running attempt is asked to end. HOLD and PAUSE write a checkpoint of the last committed step first."""

    HOLD = "hold"
    PAUSE = "pause"
    CANCEL = "cancel"


_J = JobState
JOB_TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    _J.SUBMITTED: frozenset({_J.PLANNING, _J.PAUSED, _J.CANCELLED, _J.FAILED}),
    _J.PLANNING: frozenset({_J.QUEUED, _J.PAUSED, _J.CANCELLED, _J.FAILED}),
    _J.QUEUED: frozenset({_J.PLANNING, _J.STARTING, _J.PAUSED, _J.CANCELLED, _J.FAILED}),
    _J.STARTING: frozenset({_J.RUNNING, _J.RECOVERING, _J.STOPPING, _J.PAUSED, _J.SUCCEEDED, _J.FAILED}),
    _J.RUNNING: frozenset({_J.RECOVERING, _J.PAUSED, _J.STOPPING, _J.SUCCEEDED, _J.FAILED}),
    _J.RECOVERING: frozenset({_J.QUEUED, _J.STARTING, _J.PAUSED, _J.STOPPING, _J.SUCCEEDED, _J.CANCELLED, _J.FAILED}),
    _J.PAUSED: frozenset({_J.QUEUED, _J.PLANNING, _J.STOPPING, _J.CANCELLED, _J.FAILED, _J.SUCCEEDED}),
    _J.STOPPING: frozenset({_J.CANCELLED, _J.FAILED, _J.SUCCEEDED}),
    _J.SUCCEEDED: frozenset(),
    _J.FAILED: frozenset(),
    _J.CANCELLED: frozenset(),
}

_A = AttemptState
ATTEMPT_TRANSITIONS: Mapping[AttemptState, frozenset[AttemptState]] = {
    _A.OFFERED: frozenset({_A.ACCEPTED, _A.READY, _A.RUNNING, _A.DONE, _A.FAILED, _A.LOST}),
    _A.ACCEPTED: frozenset({_A.READY, _A.RUNNING, _A.DONE, _A.FAILED, _A.LOST}),
    _A.READY: frozenset({_A.RUNNING, _A.DONE, _A.FAILED, _A.LOST}),
    _A.RUNNING: frozenset({_A.DONE, _A.FAILED, _A.LOST}),
    _A.DONE: frozenset(),
    _A.FAILED: frozenset(),
    _A.LOST: frozenset(),
}

_N = NodeLink
NODE_TRANSITIONS: Mapping[NodeLink, frozenset[NodeLink]] = {
    _N.JOINING: frozenset({_N.CONNECTED, _N.LOST, _N.LEFT}),
    _N.CONNECTED: frozenset({_N.DISCONNECTED, _N.LEFT}),
    _N.DISCONNECTED: frozenset({_N.CONNECTED, _N.LOST, _N.LEFT}),
    _N.LOST: frozenset({_N.CONNECTED, _N.LEFT}),
    _N.LEFT: frozenset({_N.JOINING, _N.CONNECTED}),
}

TERMINAL_JOB_STATES = frozenset(state for state, after in JOB_TRANSITIONS.items() if not after)
TERMINAL_ATTEMPT_STATES = frozenset(state for state, after in ATTEMPT_TRANSITIONS.items() if not after)
ACTIVE_JOB_STATES = frozenset({_J.STARTING, _J.RUNNING, _J.RECOVERING, _J.STOPPING})


def diagram() -> str:
    """The three tables as Mermaid state diagrams, for docs/architecture.md."""
    lines: list[str] = []
    tables: tuple[tuple[str, Mapping[Any, frozenset[Any]]], ...] = (
        ("Job", JOB_TRANSITIONS),
        ("Attempt", ATTEMPT_TRANSITIONS),
        ("Node", NODE_TRANSITIONS),
    )
    for title, table in tables:
        lines += [f"### {title}", "```mermaid", "stateDiagram-v2"]
        for before, after in table.items():
            lines += [f"  {before} --> {state}" for state in sorted(after)] or [f"  {before} --> [*]"]
        lines += ["```", ""]
    return "\n".join(lines)
