"""The plan: what was considered, what was chosen and why, and the subtasks it is cut into.

The plan that is printed is the object that is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from protos.capacity import Capacity, LinkEstimate
from protos.ids import NodeId, PlanId
from protos.model import ModelProfile
from protos.states import Activity, Eligibility, NodeLink


@dataclass(frozen=True, slots=True)
class NodeView:
    """A member as the planner sees it."""

    node_id: NodeId
    name: str
    capacity: Capacity
    link: NodeLink
    eligibility: Eligibility
    activity: Activity
    reason: str = ""
    mtbf_s: float | None = None  # mean time between losses of this node; None: it is never lost, as far as is known
    memory_factor: float = 1.0  # what a model asked about needed of memory, times what is predicted beyond the reserve

    @property
    def usable(self) -> bool:
        return self.link is NodeLink.CONNECTED and self.eligibility is Eligibility.OK and self.activity is Activity.IDLE


class Work(StrEnum):
    """How a rank works on a model: alone on all of it, on all of it with others, on a stage, on a shard of all layers.
    What is learned of one kind says half of another (strategies/learned.py)."""

    WHOLE = "whole"
    REPLICA = "replica"
    STAGE = "stage"
    SHARD = "shard"


@dataclass(frozen=True, slots=True)
class Factors:
    """On predicted seconds: of what grows with samples and parameters, and of what every micro-batch costs anyway."""

    work: float = 1.0
    overhead: float = 1.0


@dataclass(frozen=True, slots=True)
class Learned:
    """What finished jobs have taught about predictions; empty is nothing.

    `speeds`: by node, family of layers and kind of work; `models`: by node, model and kind of work, better known where
    it exists; `networks`: factor on the time of transfers, by network and kind of work; `steps`: seconds of a step that
    was measured, by the whole combination of job and placement; `memory`: factor on what is predicted beyond the
    workers' reserve, by family of layers, where one ran out of it.
    """

    speeds: Mapping[tuple[NodeId, str, Work], Factors] = field(default_factory=dict)
    models: Mapping[tuple[NodeId, str, Work], float] = field(default_factory=dict)
    networks: Mapping[tuple[str, Work], float] = field(default_factory=dict)
    steps: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    _by_model: dict[tuple[str, Work], dict[NodeId, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # both are made when they are asked for
    _by_family: dict[str, dict[NodeId, dict[Work, Factors]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def of_model(self, model: str, work: Work) -> Mapping[NodeId, float]:
        """Factor by node."""
        if self.models and not self._by_model:
            found: dict[tuple[str, Work], dict[NodeId, float]] = {}
            for (node_id, name, kind), factor in self.models.items():
                found.setdefault((name, kind), {})[node_id] = factor
            self._by_model.update(found)
        return self._by_model.get((model, work), {})

    def of_family(self, family: str) -> Mapping[NodeId, Mapping[Work, Factors]]:
        """Factors by node and kind of work."""
        if self.speeds and not self._by_family:
            found: dict[str, dict[NodeId, dict[Work, Factors]]] = {}
            for (node_id, name, kind), factors in self.speeds.items():
                found.setdefault(name, {}).setdefault(node_id, {})[kind] = factors
            self._by_family.update(found)
        return self._by_family.get(family, {})


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Members and the links between pairs; a pair is stored once under the sorted ids. `apart`: pairs of which one
    cannot connect to the other, with the reason: no group has both."""

    nodes: tuple[NodeView, ...]
    links: Mapping[tuple[NodeId, NodeId], LinkEstimate] = field(default_factory=dict)
    learned: Learned = field(default_factory=Learned)
    apart: Mapping[tuple[NodeId, NodeId], str] = field(default_factory=dict)

    def link(self, a: NodeId, b: NodeId) -> LinkEstimate | None:
        return self.links.get((min(a, b), max(a, b)))


@dataclass(frozen=True, slots=True)
class DataProfile:
    """What is known of a dataset before a node reads it. `rows` None: unknown until the first node reports."""

    digest: str
    rows: int | None
    bytes: int
    test_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Identification:
    """What an identify task reports: the model as it was built and the data as they were opened."""

    profile: ModelProfile
    data: DataProfile  # rows known
    feature_shapes: Mapping[str, tuple[int, ...]]  # of one sample, by name; "features" when there is one array
    feature_dtypes: Mapping[str, str]
    target_shape: tuple[int, ...] | None = None
    target_dtype: str | None = None
    classes: int | None = None


@dataclass(frozen=True, slots=True)
class RankCost:
    """Predicted for one rank and one step: `compute_s` of passes and optimizer without waiting for other ranks, of it
    `overhead_s` whatever the number of samples, and what it sends. `learned` has gone into both times."""

    node_id: NodeId
    compute_s: float
    overhead_s: float
    sent_bytes: float
    family: str = ""  # of layers, in which it spends most of the time
    learned: Factors = Factors()
    cores: float = 0.0  # its share of what its node grants; 0: not known
    memory_factor: float = 1.0  # learned, and in what is predicted for its node


@dataclass(frozen=True, slots=True)
class Basis:
    """Under which keys what comes of a prediction is learned. `modelled_step_s` is that of the formulas; a step of the
    same combination that was measured before stands in its place. `network_factor`: learned of the plan's network, and
    in the prediction; None in plans of older versions, which do not say it."""

    work: Work
    model: str
    combination: str
    modelled_step_s: float
    remembered: bool = False
    network_factor: float | None = None


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """Predicted cost of one plan. Times s, sizes bytes. `terms` names the parts of step_s (compute, sync, codec...)."""

    seconds: float
    step_s: float
    bytes_per_step: float
    memory_bytes: Mapping[NodeId, int]
    terms: Mapping[str, float] = field(default_factory=dict)
    ranks: tuple[RankCost, ...] = ()
    basis: Basis | None = None

    @property
    def peak_memory_bytes(self) -> int:
        return max(self.memory_bytes.values(), default=0)


@dataclass(frozen=True, slots=True)
class Placement:
    """Which node is which rank and how many samples of each full global batch it takes.

    In a pipeline all stages of one replica take the same samples, and so do the ranks that share single layers.
    """

    rank: int
    node_id: NodeId
    samples: int
    stage: int = 0
    replica: int = 0


class Schedule(StrEnum):
    ONE_F_ONE_B = "1f1b"  # one forward, one backward: at most S micro-batches of activations are held
    GPIPE = "gpipe"  # all forward, then all backward


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks of a group share the model. Rank = (replica * stages + stage) * tensor + part of a layer.

    `stages`: [from, to) of the profile's layers for each stage; one range of all layers when the model is not cut.
    `cut_after`: name of the last layer of every stage but the last. `tensor`: ranks among which single layers are cut
    (tensor parallel); `sharded`: parameters, gradients and optimizer state are cut over all ranks.
    """

    stages: tuple[tuple[int, int], ...]
    cut_after: tuple[str, ...] = ()
    replicas: int = 1
    schedule: Schedule = Schedule.ONE_F_ONE_B
    sharded: bool = False
    tensor: int = 1
    checkpoint_activations: bool = False

    def stage_of(self, rank: int) -> int:
        return rank // self.tensor % len(self.stages)

    def replica_of(self, rank: int) -> int:
        """All ranks of one replica take the same samples."""
        return rank // (self.tensor * len(self.stages))


@dataclass(frozen=True, slots=True)
class LinkUse:
    """Bytes of one step over the link between two nodes, both directions together."""

    a: NodeId
    b: NodeId
    bytes_per_step: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One strategy as it was considered. Infeasible ones keep their reasons; all numbers are predictions."""

    strategy: str
    feasible: bool
    reasons: tuple[str, ...]
    nodes: tuple[NodeId, ...] = ()
    seconds: float | None = None
    step_s: float | None = None
    bytes: float | None = None  # whole job, over all links
    memory_bytes: int | None = None  # peak of the worst node
    q: float = 0.0
    residual: float = 0.0
    visits: int = 0
    deviation: float = 0.0  # standard deviation of ln(predicted / measured) to be expected of `seconds`
    measured: bool = False  # step_s is that of a run of this very combination, not of the formulas
    survival: float = 1.0  # share of the time that is left of losses of nodes; `seconds` is divided by it
    terms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlannedSubtask:
    type: str  # train | identify | calibrate
    node_id: NodeId
    rank: int
    data_range: tuple[int, int]  # samples [from, to) of each full global batch
    layer_range: tuple[int, int]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    stage: int = 0
    replica: int = 0
    synchronization: str = "none"
    accumulate: int = 1
    device: int = 0  # which of the node's granted GPUs; 0 where there is none


@dataclass(frozen=True, slots=True)
class CoordinationPlan:
    rendezvous: str  # "store over the session stream"
    network: str  # loopback or the CIDR the group binds to; "" for one rank
    order: tuple[str, ...]
    barriers: tuple[str, ...]
    deadline_s: float
    retries: int
    compression: str = "none"


@dataclass(frozen=True, slots=True)
class SparePlan:
    """How the job would go on without `lost`: "" and the reason when nothing fits any more."""

    lost: tuple[NodeId, ...]
    strategy: str
    nodes: tuple[NodeId, ...]
    seconds: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    id: PlanId
    strategy: str
    reason: str
    candidates: tuple[Candidate, ...]
    subtasks: tuple[PlannedSubtask, ...]
    coordination_plan: CoordinationPlan
    estimate: CostEstimate
    state: tuple[int, int, int, int]  # Q-table cell: complexity, samples, nodes, latency
    propensity: float = 1.0
    parameters: int = 0
    steps: int | None = None
    layout: Layout | None = None  # None: every rank holds the whole model
    links: tuple[LinkUse, ...] = ()
    spares: tuple[SparePlan, ...] = ()  # of a plan over several nodes, where a person reads it
    cost_model_version: int = 0  # of the formulas that predicted it
    trials: tuple[str, ...] = ()  # strategies (or `single_node on NODE`) to run for `trial_steps` each
    trial_steps: int = 0
    expected_loss_s: float = 0.0  # of taking this strategy, for what is not known of the predictions
    explored_loss_s: float = 0.0  # predicted, of a strategy that was taken to learn about it
