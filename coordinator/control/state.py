"""What the coordinator knows while it decides: members and the life of every unfinished job.

JobView and its attempts are durable (the service writes every difference to the store before any effect); NodeStatus is
observed and rebuilt from the nodes after a restart. Times are seconds of the coordinator's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from coordinator.control.shape import Shape
from protos import limits
from protos.errors import Blame
from protos.ids import Fence, JobId, NodeId
from protos.plan import Plan
from protos.states import (
    TERMINAL_ATTEMPT_STATES,
    TERMINAL_JOB_STATES,
    Activity,
    AttemptState,
    Eligibility,
    JobState,
    NodeLink,
    Reason,
    StopMode,
)
from protos.work import Outcome

NO_FENCE = Fence(0)


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A member as seen now. `last_seen_s` is the last heartbeat; leases live as long as it is fresh."""

    node_id: NodeId
    name: str
    link: NodeLink
    eligibility: Eligibility = Eligibility.OK
    activity: Activity = Activity.IDLE
    reason: str = ""
    last_seen_s: float = 0.0
    cut_off_s: float = 0.0  # when the link went from CONNECTED to DISCONNECTED
    spared_until_s: float = 0.0  # a member of a group that was silent as a whole: not lost before, see control/step.py

    @property
    def reachable(self) -> bool:
        return self.link is NodeLink.CONNECTED

    @property
    def willing(self) -> bool:
        return self.reachable and self.eligibility is Eligibility.OK and self.activity is not Activity.PAUSED


@dataclass(frozen=True, slots=True)
class AttemptView:
    rank: int
    node_id: NodeId
    state: AttemptState
    outcome: Outcome | None = None

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL_ATTEMPT_STATES


@dataclass(frozen=True, slots=True)
class Held:
    """A node that has a checkpoint of this step on its disk."""

    node_id: NodeId
    step: int


@dataclass(frozen=True, slots=True)
class Transition:
    """A state as it was entered: the service writes every one of them down, in order."""

    state: JobState
    reason: Reason
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Generation:
    """A group that ended whole, because another plan was better: what it measured is worth knowing."""

    plan: Plan
    fence: Fence
    first_step: int  # committed when it was formed
    attempts: tuple[AttemptView, ...]


@dataclass(frozen=True, slots=True)
class JobView:
    """The life of one job. `wanted` is what the user asked for and has not happened yet."""

    job_id: JobId
    order: int  # of submission
    state: JobState = JobState.SUBMITTED
    reason: Reason = Reason.NONE
    message: str = ""
    hint: str = ""
    blame: Blame | None = None
    fence: Fence = NO_FENCE
    retries: int = 0  # re-formations in a row without a committed step
    fence_step: int = 0  # committed step when this fence was formed
    step: int = 0
    samples: int = 0
    wanted: StopMode | None = None
    not_before_s: float = 0.0  # back-off of a new group; while planning: when to ask again
    deadline_s: float | None = None  # of the phase that is bounded now (start, hold, stop)
    identified: bool = False
    plan: Plan | None = None
    next_plan: Plan | None = None  # with which the group forms again, when it holds for that
    handed_over: bool = False  # the state was uploaded for it, so no node of it need have one
    before: Plan | None = None  # gave way to `plan`, which has not committed a step yet
    unfit: frozenset[Shape] = frozenset()  # of plans that a working group gave way to and that could not begin
    revisions: int = 0
    attempts: tuple[AttemptView, ...] = ()
    held: tuple[Held, ...] = ()
    avoid: frozenset[NodeId] = frozenset()  # nodes that lacked what it needs: disk, memory, data, packages
    trail: tuple[Transition, ...] = ()  # states entered since the last write, the current one last
    left: Generation | None = None  # given up for a better plan since the last write

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL_JOB_STATES

    @property
    def working(self) -> tuple[AttemptView, ...]:
        """Attempts of the current fence that have not ended."""
        return tuple(attempt for attempt in self.attempts if not attempt.ended)


@dataclass(frozen=True, slots=True)
class State:
    nodes: Mapping[NodeId, NodeStatus] = field(default_factory=lambda: MappingProxyType({}))
    jobs: Mapping[JobId, JobView] = field(default_factory=lambda: MappingProxyType({}))

    def with_node(self, node: NodeStatus) -> State:
        return replace(self, nodes=MappingProxyType({**self.nodes, node.node_id: node}))

    def with_job(self, job: JobView) -> State:
        return replace(self, jobs=MappingProxyType({**self.jobs, job.job_id: job}))

    def without_job(self, job_id: JobId) -> State:
        return replace(self, jobs=MappingProxyType({key: job for key, job in self.jobs.items() if key != job_id}))

    def busy(self) -> frozenset[NodeId]:
        """Nodes that hold an unfinished attempt of any job."""
        return frozenset(attempt.node_id for job in self.jobs.values() if not job.ended for attempt in job.working)

    def idle(self) -> tuple[NodeId, ...]:
        """Willing, without an attempt, and by its own word without a worker of an earlier one that is still ending."""
        busy = self.busy()
        return tuple(
            sorted(
                node.node_id
                for node in self.nodes.values()
                if node.willing and node.node_id not in busy and node.activity is not Activity.BUSY
            )
        )

    def willing(self) -> tuple[NodeId, ...]:
        return tuple(sorted(node.node_id for node in self.nodes.values() if node.willing))


@dataclass(frozen=True, slots=True)
class Timing:
    """The bounds of waiting, in seconds; tests shorten them."""

    lease_ttl_s: float = limits.LEASE_TTL_S
    reconnect_grace_s: float = limits.RECONNECT_GRACE_S
    cut_off_grace_s: float = 1.0  # a cut-off node keeps a group waiting that is re-forming for no longer
    identify_s: float = 900.0  # until an identification without an answer is asked for again
    start_s: float = 120.0
    hold_s: float = 20.0
    hand_over_s: float = 130.0  # before a pause, or when a node goes: node/attempt.py takes up to 65 + 60 s
    stop_s: float = 10.0
    retries: int = 3

    def backoff_s(self, retries: int) -> float:
        """MISSION.md K10: 2**attempt seconds."""
        return float(2**retries)
