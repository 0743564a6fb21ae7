"""Makes qtable/prior.json: per cell the mean reward the cost model predicts, over random clusters and jobs.

    python -m bench.build_prior [--check]

Q0[cell, action] = mean of max(-2, ln(T_best / T_action)) over WORLDS worlds with a fixed seed, -2 where the action is
never feasible. Run it after every change of COST_MODEL_VERSION; --check only compares (exit 1 when it differs).
"""

from __future__ import annotations

import json
import math
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from protos.capacity import Capacity, FamilyRate, TrustedNetwork
from protos.ids import NodeId
from protos.jobspec import JobSpec, parse
from protos.model import Family, LayerProfile, ModelProfile, Requirements, complexity_of
from protos.plan import ClusterView, DataProfile, NodeView
from protos.states import Activity, Eligibility, NodeLink
from qtable.prior import load_prior, prior_document
from qtable.reward import LIMIT
from qtable.state import ACTIONS, SHAPE, Observation, StateKey
from qtable.table import Array
from strategies.base import Inputs
from strategies.cost import COST_MODEL_VERSION
from strategies.registry import BUILT

SEED = 20240229
WORLDS = 24
LAYERS = 2
PRIOR = Path(__file__).resolve().parent.parent / "qtable" / "prior.json"

_PARAMETERS = ((1e3, 1e6), (1e6, 1e8), (1e8, 1e9), (1e9, 1e10))
_ROWS = ((1e2, 1e4), (1e4, 1e5), (1e5, 1e7))
_NODES = ((1, 2), (3, 5), (6, 10), (11, 16))
_RTT_S = ((5e-5, 2e-3), (2e-3, 3e-2), (3e-2, 0.3))


def build(worlds: int = WORLDS, seed: int = SEED) -> Array:
    q0 = np.full(SHAPE, -LIMIT)
    cells = list(product(*(range(size) for size in SHAPE[:-1])))
    with ProcessPoolExecutor() as pool:  # cells know nothing of each other
        for cell, means in zip(cells, pool.map(partial(_means, worlds, seed), cells, chunksize=4), strict=True):
            q0[cell] = means
    return q0


def _means(worlds: int, seed: int, cell: tuple[int, ...]) -> list[float]:
    """Of the rewards of each action in one cell."""
    rng = random.Random(f"{seed}/{cell}")
    seen: dict[str, list[float]] = {action: [] for action in ACTIONS}
    for _ in range(worlds):
        for action, value in _world(StateKey(*cell), rng).items():
            seen[action].append(value)
    return [sum(seen[action]) / len(seen[action]) if seen[action] else -LIMIT for action in ACTIONS]


def _world(key: StateKey, rng: random.Random) -> dict[str, float]:
    """One random cluster and job of a cell: predicted reward of every feasible action."""
    parameters = int(_between(rng, *_PARAMETERS[key.complexity]))
    rows = int(_between(rng, *_ROWS[key.samples]))
    count = rng.randint(*_NODES[key.nodes])
    rtt_s = _between(rng, *_RTT_S[key.latency])
    nodes = tuple(_node(index, rtt_s, parameters, rng) for index in range(count))
    if Observation(parameters, rows, count, rtt_s).key != key:
        raise AssertionError(f"the world is not of the cell {key}")
    cluster = ClusterView(nodes)
    inputs = Inputs(_job(rng), _profile(parameters, rng), DataProfile("", rows, rows * 1000), cluster)
    strategies = {name: s for name, s in BUILT.items() if not s.feasible(inputs)}
    seconds = {name.value: strategy.estimate(inputs).cost.seconds for name, strategy in strategies.items()}
    best_s = min(seconds.values(), default=1.0)
    return {action: max(-LIMIT, math.log(best_s / value)) for action, value in seconds.items()}


def _between(rng: random.Random, low: float, high: float) -> float:
    """Log-uniform in [low, high)."""
    return min(math.exp(rng.uniform(math.log(low), math.log(high))), math.nextafter(high, low))


def _job(rng: random.Random) -> JobSpec:
    batch = 2 ** rng.randint(4, 10)
    train = {"batch_size": batch, "epochs": rng.randint(1, 20)}
    return parse({"model": {"source": "model.py:build"}, "data": {"source": "d.npz"}, "train": train})


def _profile(parameters: int, rng: random.Random) -> ModelProfile:
    """Two equal layers that stand for all: from 2 FLOP per parameter (dense) to 500 (convolutions, long sequences). One
    model in ten can be cut between them: enough for a mean, and the search for stages takes most of the time."""
    kind, reuse = ("Linear", _between(rng, 2, 500)) if rng.random() < 0.6 else ("Conv2d", _between(rng, 10, 500))
    activations = 4e3 + 0.02 * parameters * reuse / 2
    layer = LayerProfile(
        "", kind, parameters // LAYERS, reuse * parameters / LAYERS, activations / LAYERS, 4e3, (), 4e3
    )
    layers = tuple(replace(layer, name=f"block.{index}") for index in range(LAYERS))
    need = Requirements(1.0, 0, 0, 1.0, "layers")
    return ModelProfile(
        "pytorch", "source", Family.UNKNOWN, "", parameters, 4 * parameters, True, ("float32",), (250,),
        complexity_of(parameters), layers, need, 1.0, why_not_cut="" if rng.random() < 0.1 else "it loops",
    )  # fmt: skip


def _node(index: int, rtt_s: float, parameters: int, rng: random.Random) -> NodeView:
    """Speeds span 30x; some have a GPU's; memory is enough for the model on most of them."""
    flops = _between(rng, 1e10, 3e11) * (20 if rng.random() < 0.25 else 1)
    overhead_s = _between(rng, 2e-4, 2e-3)
    rates = {
        "matmul": FamilyRate(flops, overhead_s),
        "conv": FamilyRate(0.6 * flops, 1.5 * overhead_s),
        "tiny": FamilyRate(0.05 * flops, overhead_s),
    }
    capacity = Capacity(
        hostname="", machine_id=str(index), platform="", python="", cores=4.0, cores_total=4,
        memory_bytes=int(_between(rng, 8e9, 64e9) + 24 * parameters), memory_total_bytes=0, disk_free_bytes=0,
        families=rates, networks=(TrustedNetwork("10.0.0.0/8", "eth0", ""),),
        rtt_s=rtt_s, bandwidth_bytes_per_s=_between(rng, 1e6, 1.2e9),
    )  # fmt: skip
    return NodeView(
        NodeId(f"n{index}"), f"n{index}", capacity, NodeLink.CONNECTED, Eligibility.OK, Activity.IDLE
    )  # fmt: skip


def main() -> int:
    q0 = build()
    if "--check" in sys.argv[1:]:
        same = (
            bool(np.allclose(load_prior().q0, q0, atol=1e-3)) and load_prior().cost_model_version == COST_MODEL_VERSION
        )
        print("qtable/prior.json is fresh" if same else "qtable/prior.json is stale: run python -m bench.build_prior")
        return 0 if same else 1
    PRIOR.write_text(
        json.dumps(prior_document(q0, COST_MODEL_VERSION, SEED, WORLDS), indent=1) + "\n", encoding="utf-8"
    )
    print(f"wrote {PRIOR}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
