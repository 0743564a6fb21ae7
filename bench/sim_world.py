"""Random clusters and jobs for bench/sim_planner.py: what the planner is told of them, and what is hidden from it.

Machines of a home or a lab: laptops to gaming PCs, on a wired LAN, Wi-Fi or a VPN. The planner sees rates as a node
would measure them when it joins: two batch sizes of a small model timed on the hidden machine, with noise. Everything
follows from the seed. The hidden side is read by bench/sim_truth.py only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

from protos.capacity import Capacity, FamilyRate, LinkEstimate, Rate, TrustedNetwork
from protos.ids import NodeId
from protos.jobspec import JobSpec, parse
from protos.model import Complexity, Family, LayerProfile, ModelProfile, Requirements, complexity_of
from protos.plan import ClusterView, DataProfile, NodeView
from protos.states import Activity, Eligibility, NodeLink
from strategies.cost import CALIBRATED_LAYERS

NETWORK = "10.0.0.0/8"
NETWORKS = (  # round trips and bytes per second: gigabit, faster, Wi-Fi, VPN
    ((1e-4, 8e-4), (117e6, 117e6)),
    ((1e-4, 4e-4), (3e8, 1.1e9)),
    ((2e-3, 8e-3), (4e6, 4e7)),
    ((1e-2, 6e-2), (1e6, 1.2e7)),
)
FAMILIES = ("matmul", "conv", "rnn", "embedding", "tiny")
CALIBRATION_NOISE = 0.03
LONGEST_STEP_S = 2.0  # on the fastest machine: people choose a batch that they see making progress
CUT_SHARE = 0.5  # of the models can be cut into stages
USUAL_HOURS = {Complexity.SMALL: 0.5, Complexity.MEDIUM: 2.0, Complexity.LARGE: 8.0, Complexity.XLARGE: 24.0}
_CALIBRATION_FLOPS = {"matmul": 5e5, "conv": 2e6, "rnn": 8e5, "embedding": 1e5, "tiny": 3e3}  # of a layer and sample
_CALIBRATION_ROWS = (32, 128)
_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Hidden:
    """A machine as it is. A kernel with w FLOPs runs at peak * (w / (w + small))^bend; a working set beyond the cache
    slows it down by up to `thrash`; every layer costs `dispatch_s`, every step varies by `jitter`."""

    peaks: dict[str, float]
    small_flops: float
    bend: float
    dispatch_s: float
    cache_bytes: float
    thrash: float
    jitter: float
    memory_bytes_per_s: float
    wire_bytes_per_s: float  # its own way into the network
    wire_rtt_s: float

    def kernel_s(self, family: str, flops: float, working_set_bytes: float) -> float:
        """One layer forward and backward."""
        efficiency = math.pow(flops / (flops + self.small_flops), self.bend)
        full = working_set_bytes / (working_set_bytes + self.cache_bytes)
        return self.dispatch_s + 3 * flops / (self.peaks[family] * efficiency) * (1 + self.thrash * full)


@dataclass(frozen=True, slots=True)
class Wires:
    """What is common to all links of a world."""

    background: float  # share of every link that others use
    crowding: float  # how much each further rank of a collective costs the others
    overlap: float  # share of the shorter of computing and sending that hides behind the other
    handing_s: float  # of each message, in the ranks


@dataclass(frozen=True, slots=True)
class World:
    """`errors`: standard normal, by (node, family, kind of work) and by (network, kind of work), drawn when first asked
    for, so that they persist."""

    seed: str
    cluster: ClusterView
    hidden: dict[NodeId, Hidden]
    wires: Wires
    spare_memory: float  # share of what activations take that the allocator holds beside them
    errors: dict[tuple[str, ...], float] = field(compare=False)


@dataclass(frozen=True, slots=True)
class Job:
    spec: JobSpec
    profile: ModelProfile
    data: DataProfile


class _Errors(dict[tuple[str, ...], float]):
    def __init__(self, seed: str) -> None:
        super().__init__()
        self._seed = seed

    def __missing__(self, key: tuple[str, ...]) -> float:
        value: float = random.Random(f"{self._seed}/{key}").gauss(0, 1)
        self[key] = value
        return value


def world(seed: str, least: int = 2, most: int = 8) -> World:
    """Small clusters are as frequent as all others together."""
    rng = random.Random(seed)
    rtts, rates = rng.choices(NETWORKS, (40, 10, 25, 25))[0]
    hidden = {}
    middle = max(least, (least + most) // 2)
    count = rng.randint(least, middle) if rng.random() < 0.5 else rng.randint(middle, most)
    for index in range(count):
        hidden[NodeId(f"n{index}")] = _machine(rng, _between(rng, *rates), _between(rng, *rtts))
    wires = Wires(rng.uniform(0, 0.15), rng.uniform(0, 0.1), rng.uniform(0.2, 0.8), _between(rng, 5e-5, 4e-4))
    nodes = tuple(_node(node_id, machine, rng) for node_id, machine in hidden.items())
    links = {
        (a, b): LinkEstimate(
            _noisy(rng, hidden[a].wire_rtt_s / 2 + hidden[b].wire_rtt_s / 2),
            _noisy(rng, min(hidden[a].wire_bytes_per_s, hidden[b].wire_bytes_per_s)),
            NETWORK,
        )
        for a, b in combinations(sorted(hidden), 2)
    }
    return World(seed, ClusterView(nodes, links), hidden, wires, rng.uniform(0.0, 0.2), _Errors(seed))


def _machine(rng: random.Random, wire_bytes_per_s: float, wire_rtt_s: float) -> Hidden:
    quick = rng.random() < 0.25  # a gaming PC
    peak = _between(rng, 2e10, 3e11) * (rng.uniform(5, 20) if quick else 1)
    shares = {"matmul": 1.0, "conv": rng.uniform(0.3, 1.0), "rnn": rng.uniform(0.1, 0.5)}
    shares |= {"embedding": rng.uniform(0.05, 0.2), "tiny": rng.uniform(0.1, 0.4)}
    return Hidden(
        peaks={family: peak * share for family, share in shares.items()},
        small_flops=_between(rng, 3e4, 1e6) * (20 if quick else 1),
        bend=rng.uniform(0.5, 1.0),
        dispatch_s=_between(rng, 1e-5, 1.5e-4),
        cache_bytes=_between(rng, 4e6, 1e8),
        thrash=rng.uniform(0.0, 0.4),
        jitter=rng.uniform(0.01, 0.1),
        memory_bytes_per_s=_between(rng, 6e9, 5e10) * (4 if quick else 1),
        wire_bytes_per_s=wire_bytes_per_s,
        wire_rtt_s=wire_rtt_s,
    )


def _node(node_id: NodeId, machine: Hidden, rng: random.Random) -> NodeView:
    bandwidth = _noisy(rng, machine.memory_bytes_per_s)
    capacity = Capacity(
        hostname=node_id, machine_id=node_id, platform="", python="", cores=4.0, cores_total=4,
        memory_bytes=int(_between(rng, 3, 48) * _GIB), memory_total_bytes=64 * _GIB, disk_free_bytes=0,
        memory_bandwidth=Rate(bandwidth, bandwidth, 0.0),
        families={family: _calibrated(machine, family, rng) for family in FAMILIES},
        networks=(TrustedNetwork(NETWORK, "eth0", ""),),
        rtt_s=machine.wire_rtt_s, bandwidth_bytes_per_s=machine.wire_bytes_per_s,
    )  # fmt: skip
    return NodeView(node_id, node_id, capacity, NodeLink.CONNECTED, Eligibility.OK, Activity.IDLE)


def _calibrated(machine: Hidden, family: str, rng: random.Random) -> FamilyRate:
    """A line through the times of two batch sizes, as strategies/calibrate_torch.py draws it."""
    layers, flops = CALIBRATED_LAYERS[family], _CALIBRATION_FLOPS[family]
    few, many = (
        _noisy(rng, layers * machine.kernel_s(family, rows * flops, 4e3 * rows), CALIBRATION_NOISE)
        for rows in _CALIBRATION_ROWS
    )
    fewer, more = _CALIBRATION_ROWS
    slope_s = max((many - few) / (more - fewer), 0.1 * many / more)
    return FamilyRate(3 * layers * flops / slope_s, max(few - fewer * slope_s, 0.05 * few))


def job(rng: random.Random, fastest_flops: float) -> Job:
    """A model of four to ten blocks; the fastest machine takes a quarter to four times the usual hours for the run."""
    kind = rng.choice(("mlp", "cnn", "transformer", "transformer", "rnn"))
    parameters = _between(rng, 1e5, 3e8)
    tokens = {"mlp": 1, "rnn": 2 ** rng.randint(4, 7), "transformer": 2 ** rng.randint(5, 9)}
    reuse = float(tokens.get(kind, _between(rng, 20, 300)))
    layers = _layers(rng, kind, parameters, reuse)
    total, count = sum(layer.flops_per_sample for layer in layers), sum(layer.parameters for layer in layers)
    activations = sum(layer.activation_bytes_per_sample for layer in layers)
    family = {"mlp": Family.MLP, "cnn": Family.CNN, "transformer": Family.TRANSFORMER, "rnn": Family.RNN}[kind]
    profile = ModelProfile(
        "pytorch", "source", family, "", count, 4 * count, True, ("float32",), (256,), complexity_of(count), layers,
        Requirements(1.0, 0, 0, 1.0, "layers"), 1.0, peak_activation_bytes_per_sample=activations,
        why_not_cut="" if rng.random() < CUT_SHARE else "it loops",
    )  # fmt: skip
    sample_s = 3 * total / fastest_flops
    batch = 2 ** rng.randint(3, max(3, min(9, int(math.log2(LONGEST_STEP_S / sample_s)))))
    step_s = batch * sample_s
    job_s = 3600 * USUAL_HOURS[complexity_of(count)] * _between(rng, 0.25, 4.0)
    steps = int(min(1e6, max(50.0, job_s / step_s)))
    train = {"batch_size": batch, "steps": steps, "optimizer": {"name": rng.choice(("adamw", "sgd")), "lr": 0.001}}
    spec = parse({"model": {"source": "model.py:build"}, "data": {"source": "d.npz"}, "train": train})
    rows = int(_between(rng, 1e3, 1e6))
    return Job(spec, profile, DataProfile("", rows, min(rows * 1000, 10**8)))


def fastest_flops(found: World) -> float:
    return max(machine.peaks["matmul"] for machine in found.hidden.values()) / 2


def _layers(rng: random.Random, kind: str, parameters: float, reuse: float) -> tuple[LayerProfile, ...]:
    count = rng.randint(4, 10)
    weights = [rng.uniform(0.5, 1.5) for _ in range(count)]
    if kind == "cnn":  # parameters at the end, activations at the front
        weights = [weight * 4 ** (index / count * 2) for index, weight in enumerate(weights)]
    total = sum(weights)
    layers = []
    for index, weight in enumerate(weights):
        own = max(100.0, parameters * weight / total)
        times = reuse * (4 ** ((count - index) / count * 2 - 1) if kind == "cnn" else 1.0)
        width = math.sqrt(own / (12 if kind == "transformer" else 1))
        output = 4 * width * (times if kind in ("transformer", "rnn", "cnn") else 1.0)
        held = output * {"transformer": 12.0, "rnn": 4.0, "cnn": 3.0, "mlp": 2.0}[kind]
        name = {"transformer": "Linear", "mlp": "Linear", "rnn": "LSTM", "cnn": "Conv2d"}[kind]
        layers.append(LayerProfile(f"block.{index}", name, int(own), 2 * own * times, held, output, (), output))
    return tuple(layers)


def _between(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _noisy(rng: random.Random, value: float, deviation: float = 0.05) -> float:
    return value * math.exp(rng.gauss(0, deviation))


def jobs(found: World, count: int, again: float = 0.5) -> Sequence[Job]:
    """What the people of one cluster submit: with probability `again` a job they ran before, else a new one."""
    rng = random.Random(f"{found.seed}/jobs")
    known: list[Job] = []
    order = []
    for _ in range(count):
        if known and rng.random() < again:
            order.append(rng.choice(known))
        else:
            known.append(job(rng, fastest_flops(found)))
            order.append(known[-1])
    return order
