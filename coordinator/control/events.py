"""What happened (past tense) and what must be done (imperative): the two alphabets of the control loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from protos.errors import Blame
from protos.ids import Fence, JobId, NodeId
from protos.plan import Candidate, Plan
from protos.states import Activity, AttemptState, Reason, StopMode
from protos.work import HeldLease, Outcome


@dataclass(frozen=True, slots=True)
class Submitted:
    job_id: JobId
    order: int


@dataclass(frozen=True, slots=True)
class Identified:
    job_id: JobId


@dataclass(frozen=True, slots=True)
class Refused:
    """Identification or planning ended with something the user must change."""

    job_id: JobId
    reason: Reason
    blame: Blame
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class IdentificationDelayed:
    """No node could identify the model now; asked again when the members change or at the next tick."""

    job_id: JobId
    message: str


@dataclass(frozen=True, slots=True)
class NodeConnected:
    node_id: NodeId
    name: str
    activity: Activity
    activity_reason: str
    leases: tuple[HeldLease, ...]


@dataclass(frozen=True, slots=True)
class NodeHeard:
    """A heartbeat, or anything else the node said."""

    node_id: NodeId
    activity: Activity | None = None
    activity_reason: str = ""


@dataclass(frozen=True, slots=True)
class NodeDisconnected:
    node_id: NodeId


@dataclass(frozen=True, slots=True)
class NodeLeft:
    node_id: NodeId
    for_good: bool
    why: str


@dataclass(frozen=True, slots=True)
class NodeControlled:
    """An administrator's word: cordon, uncordon, drain, remove."""

    node_id: NodeId
    action: str


@dataclass(frozen=True, slots=True)
class AttemptReported:
    node_id: NodeId
    job_id: JobId
    fence: Fence
    rank: int
    state: AttemptState
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Progressed:
    node_id: NodeId
    job_id: JobId
    fence: Fence
    step: int
    samples: int


@dataclass(frozen=True, slots=True)
class Revised:
    """Another plan is better for the rest of a running job, or the next one is to be tried out."""

    job_id: JobId
    fence: Fence
    plan: Plan
    message: str


@dataclass(frozen=True, slots=True)
class Settled:
    """The trials of a running job are over, and the plan that runs is the one that stays."""

    job_id: JobId
    fence: Fence


@dataclass(frozen=True, slots=True)
class UserAsked:
    """cancel, pause or resume."""

    job_id: JobId
    action: str


@dataclass(frozen=True, slots=True)
class Ticked:
    pass


Event = (
    Submitted
    | Identified
    | Refused
    | IdentificationDelayed
    | NodeConnected
    | NodeHeard
    | NodeDisconnected
    | NodeLeft
    | NodeControlled
    | AttemptReported
    | Progressed
    | Revised
    | Settled
    | UserAsked
    | Ticked
)


@dataclass(frozen=True, slots=True)
class Identify:
    job_id: JobId


@dataclass(frozen=True, slots=True)
class StopIdentifying:
    """Paused before it was identified: whoever looks at its model need not go on."""

    job_id: JobId


@dataclass(frozen=True, slots=True)
class Offer:
    node_id: NodeId
    job_id: JobId
    fence: Fence
    rank: int


@dataclass(frozen=True, slots=True)
class Stop:
    node_id: NodeId
    job_id: JobId
    fence: Fence
    mode: StopMode
    reason: str


@dataclass(frozen=True, slots=True)
class CloseRendezvous:
    """The store of this generation is of no more use."""

    job_id: JobId
    fence: Fence


@dataclass(frozen=True, slots=True)
class Finish:
    """The job has ended: assemble result, report and reward in the same transaction."""

    job_id: JobId


Effect = Identify | StopIdentifying | Offer | Stop | CloseRendezvous | Finish


@dataclass(frozen=True, slots=True)
class Unplaced:
    """Why a job cannot be placed. `permanent`: no change of who is busy would help. `candidates`: if considered."""

    message: str
    hint: str
    permanent: bool
    reason: Reason
    candidates: tuple[Candidate, ...] = ()


PlanFor = Callable[[JobId, tuple[NodeId, ...], tuple[NodeId, ...], tuple[NodeId, ...], str | None], Plan | Unplaced]
"""(job, idle nodes, all willing nodes, holders of its newest state, last plan's strategy) -> plan or why not."""
