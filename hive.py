"""Hive for programs: `job = hive.submit("job.yaml"); job.wait(); job.metrics()[-1]`. Re-exports, nothing else."""

from coordinator.sdk import Job, jobs, nodes, plan, submit
from protos.errors import (
    AccessError,
    Conflict,
    DeadlineExceeded,
    Exhausted,
    HiveError,
    JobFailed,
    NoPlacement,
    NotFound,
    SpecError,
    Unreachable,
)
from protos.version import SOFTWARE as __version__

__all__ = [
    "AccessError",
    "Conflict",
    "DeadlineExceeded",
    "Exhausted",
    "HiveError",
    "Job",
    "JobFailed",
    "NoPlacement",
    "NotFound",
    "SpecError",
    "Unreachable",
    "__version__",
    "jobs",
    "nodes",
    "plan",
    "submit",
]
