"""What a node is asked to do and what it answers: leases, tasks, progress, outcomes.

These travel as JSON documents inside the session stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from protos.artifact import Artifact, Manifest
from protos.errors import Blame
from protos.ids import Digest, Fence, JobId
from protos.jobspec import JobSpec
from protos.plan import Layout
from protos.states import AttemptState, Reason

NO_FENCE = Fence(0)


class TaskKind(StrEnum):
    IDENTIFY = "identify"  # build the model on the meta device, profile it, describe the data
    CALIBRATE = "calibrate"
    TRAIN = "train"


@dataclass(frozen=True, slots=True)
class Resume:
    """A committed checkpoint: manifest of model.safetensors, optimizer.safetensors and state.json."""

    step: int
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Task:
    """One rank's share of a job. Paths are not here: the node decides where files lie."""

    kind: TaskKind
    job_id: JobId
    fence: Fence
    rank: int
    world_size: int
    strategy: str
    spec: JobSpec
    samples: tuple[int, ...]  # per replica (a rank, without a layout), of one full global batch; sums to its size
    accumulate: int = 1  # micro-batches this rank cuts its slice into
    device: int = 0  # which of the node's granted GPUs; 0 where there is none
    ranks_here: int = 1  # of this job on this node: they share its cores
    network: str = ""  # what the group binds to
    compression: str = "none"
    collective_timeout_s: float = 20.0
    deadline_s: float = 120.0  # offered -> ready; of an identify task: worker started -> its answer
    code: Manifest | None = None
    data: Manifest | None = None
    test: Manifest | None = None
    weights: Manifest | None = None
    resume: Resume | None = None
    layout: Layout | None = None  # None: every rank holds the whole model
    data_digest: str | None = None  # of the opened training data when the job was identified; None: not compared


@dataclass(frozen=True, slots=True)
class Lease:
    """A task granted to a node under a fence. Renewed by every heartbeat that names it."""

    job_id: JobId
    fence: Fence
    rank: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """One record of metrics.jsonl. `time` is Unix seconds; counts are of committed steps only."""

    time: float
    step: int
    epoch: int
    stage: str  # train | evaluate
    loss: float | None
    samples: int  # committed since the start of the job
    accuracy: float | None = None
    samples_per_s: float | None = None
    bytes_sent: int | None = None
    convergence_rate: float | None = None
    node: str = ""
    rank: int = 0


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What a rank's usual step took lately; the same names as in Usage, which is of all steps."""

    step_compute_s: float  # passes and optimizer, without waiting for other ranks
    step_sync_s: float  # waiting for other ranks
    step_cpu_s: float  # CPU time, without that of threads which carry collectives; 0: not known
    step_carrying_s: float  # CPU time of threads which carry collectives


@dataclass(frozen=True, slots=True)
class Progress:
    """Sent at most a few times a second: the per-step records since the last one, and where the run stands."""

    metrics: tuple[Metrics, ...]
    step: int
    steps_total: int | None
    epoch: int
    epochs_total: int | None
    stage: str
    samples: int
    step_times: StepTimes | None = None  # now and then, of each rank of a group


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an attempt did not finish. `retryable` False: the same job would fail again (user code, data, NaN)."""

    reason: Reason
    blame: Blame
    message: str
    hint: str = ""
    retryable: bool = False
    last_lines: tuple[str, ...] = ()

    @property
    def lacking(self) -> bool:
        """Whether another node may have what this one has not: the job's data, or a package that its model needs."""
        lacks_package = self.reason is Reason.MODEL_UNUSABLE and self.blame is Blame.NODE
        return self.retryable and (self.reason is Reason.DATA_UNUSABLE or lacks_package)


@dataclass(frozen=True, slots=True)
class Usage:
    """What one rank really did, for the report."""

    samples: int  # this rank's own share, this attempt
    steps: int
    seconds: float  # in the training loop
    compute_s: float
    sync_s: float
    bytes_sent: int
    peak_memory_bytes: int
    startup_s: float = 0.0
    baseline_memory_bytes: int = 0  # before the model was built: what the libraries take
    holds: tuple[str, ...] = ()  # layers this rank held, when it was not all of them
    step_compute_s: float = 0.0  # of a usual step: passes and optimizer, without waiting for other ranks
    step_sync_s: float = 0.0  # of a usual step: waiting for other ranks
    step_bytes_sent: int = 0  # of a usual step
    step_cpu_s: float = 0.0  # of a usual step: CPU time, without that of threads which carry collectives; 0: not known
    step_carrying_s: float = 0.0  # of a usual step: CPU time of threads which carry collectives


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt of one rank ended. DONE carries artifacts (rank 0) and usage, FAILED a fault."""

    state: AttemptState  # DONE | FAILED
    step: int = 0
    samples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifacts: tuple[Artifact, ...] = ()
    usage: Usage | None = None
    fault: Fault | None = None
    held_step: int | None = None  # a checkpoint of this step lies on the node
    document: str = ""  # JSON result of identify and calibrate tasks


@dataclass(frozen=True, slots=True)
class HeldLease:
    """What a node re-presents in Hello: a lease it still works on, or whose result was not yet acknowledged."""

    job_id: JobId
    fence: Fence
    rank: int
    state: AttemptState
    step: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint a node has uploaded: the whole state, or one of the parts that ranks of one fence hold."""

    step: int
    samples: int
    manifest: Manifest
    fence: Fence = NO_FENCE
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """What the coordinator has of a job: its newest whole state, and parts of newer ones that are not complete yet."""

    newest: Checkpoint | None = None
    pending: tuple[Checkpoint, ...] = ()


__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Digest",
    "Fault",
    "HeldLease",
    "Lease",
    "Metrics",
    "Outcome",
    "Progress",
    "Resume",
    "Task",
    "TaskKind",
    "Usage",
]
