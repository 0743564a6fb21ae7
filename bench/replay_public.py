"""Public measurements against hive's cost model: `python -m bench.replay_public [--adaptdl FOLDER] [--json FILE]`.

Every configuration that was measured is asked of the strategies as a job that forces it, on nodes described by public
figures. Per setting: the predicted winner, predicted over measured, and what following the prediction would have cost
(top-1 regret). "calibrated": all predictions scaled so that the first configuration is right, as a node's own
calibration would. Where docs/benchmarks.md says that the predicted winner is the measured one, that is a gate. What was
measured and is not asked is a row of its own with the reason; without the AdaptDL traces, all of their rows, the run
has not passed. docs/benchmarks.md names the sources.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: what is imported lies beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.replay_traces import applications
from bench.report import Bound, Figure, Finding, Gate, document, table
from protos.capacity import Capacity, DeviceInfo, FamilyRate, LinkEstimate, Rate, TrustedNetwork
from protos.ids import NodeId
from protos.jobspec import StrategyName, parse
from protos.model import Family, LayerProfile, ModelProfile, Requirements, complexity_of
from protos.plan import ClusterView, DataProfile, NodeView
from protos.states import Activity, Eligibility, NodeLink
from strategies.base import Inputs
from strategies.cost import RECOMPUTE_FACTOR
from strategies.registry import BUILT

NETWORK = "10.0.0.0/8"


@dataclass(frozen=True, slots=True)
class Gpus:
    """One rank's hardware; `tensor` GPUs that share every layer count as one rank, as that many times as fast."""

    name: str
    sustained_flops: float
    memory_bytes: float
    memory_bytes_per_s: float
    tensor: int = 1


@dataclass(frozen=True, slots=True)
class Transformer:
    layers: int
    width: int
    tokens: int
    vocabulary: int = 50_257


@dataclass(frozen=True, slots=True)
class Setting:
    """`measured`: seconds of an iteration by (replicas, stages). Links in bytes per second. `claimed`: hive says
    that it predicts the winner, so anything else fails the run."""

    name: str
    gpus: Gpus
    nodes: int
    ranks_per_node: int
    local_link: float
    link: float
    model: Transformer
    batch: int
    measured: Mapping[tuple[int, int], float]
    claimed: bool = False


# Sustained rates are assumptions, a third of the fp16 peak and half of the fp32 peak; AMP ran with fp16 optimisation
# enabled, so both are asked there. Of Sailor's runs the precision is not known here.
T4_FP16 = Gpus("T4, fp16", 20e12, 16e9, 320e9)
T4_FP32 = Gpus("T4, fp32", 4.05e12, 16e9, 320e9)
GH200 = Gpus("4 GH200, tensor parallel", 33.5e12, 96e9, 4e12, tensor=4)
AMP_S = {(16, 1): 1.32, (4, 4): 1.20, (1, 16): 1.55}
SETTINGS = (
    Setting(
        "AMP, GPT-2, 16 T4 at fp16 rates", T4_FP16, 4, 4, 6.25e9, 6.25e9, Transformer(24, 1024, 1024), 32, AMP_S,
        claimed=True,
    ),
    Setting("AMP, GPT-2, 16 T4 at fp32 rates", T4_FP32, 4, 4, 6.25e9, 6.25e9, Transformer(24, 1024, 1024), 32, AMP_S),
    Setting(
        "Sailor, OPT-350M, 16 nodes of 4 GH200", GH200, 16, 1, 150e9, 100e9, Transformer(24, 1024, 2048), 1024,
        {(16, 1): 1.926, (8, 2): 2.311, (4, 4): 2.726}, claimed=True,
    ),
    Setting(
        "Sailor, OPT-350M, 32 nodes of 4 GH200", GH200, 32, 1, 150e9, 100e9, Transformer(24, 1024, 2048), 1024,
        {(32, 1): 1.026, (16, 2): 1.225, (8, 4): 1.475},
    ),
    Setting(
        "Sailor, GPT-Neo-2.7B, 8 nodes of 4 GH200", GH200, 8, 1, 150e9, 100e9, Transformer(32, 2560, 2048), 1024,
        {(4, 2): 12.66, (2, 4): 13.86}, claimed=True,
    ),
)  # fmt: skip
MLPERF_MINUTES = {8: 13.62, 16: 7.93, 64: 2.51}  # v4.0, ResNet-50 on H100
NOT_ASKED = (  # measured, and no plan of hive's
    ("AMP, GPT-2, 16 T4: the best with tensor parallelism", 1.55, "s",
     "its shape is not known here; hive cuts layers among all ranks of a group, never beside replicas or stages"),
    ("Calculon, Megatron 22B, TP8: a step", 1.42, "s",
     "batch, precision and links are not given with it; only what recomputing costs is compared"),
    ("Calculon, Megatron 175B, TP8 x PP8: a step", 18.13, "s",
     "no plan of hive's cuts layers within stages; only what recomputing costs is compared"),
    ("MLPerf v4.0 ResNet-50, 8 H100: to the target", 13.62, "min",
     "reading images and the number of epochs are not predicted; only the loss of scaling is shown"),
)  # fmt: skip
TRACES = "simulator/traces of petuum/adaptdl, branch osdi21-artifact"
PUBLISHED_ROWS = 7103
CALCULON_S = {"Megatron 22B, TP8": (1.42, 1.10), "Megatron 175B, TP8 x PP8": (18.13, 13.75)}


Answer = float | tuple[str, ...]  # seconds of a step, or the reasons why hive cannot run it


def predicted(setting: Setting) -> dict[tuple[int, int], Answer]:
    """By configuration, each of those that were measured."""
    found: dict[tuple[int, int], Answer] = {}
    for replicas, stages in setting.measured:
        inputs = Inputs(
            _spec(setting, replicas, stages), _profile(setting.model), DataProfile("", 10**6, 0), _cluster(setting)
        )
        strategy = BUILT[StrategyName(inputs.spec.strategy)]
        found[replicas, stages] = strategy.feasible(inputs) or strategy.estimate(inputs).cost.step_s
    return found


def seconds_of(answers: Mapping[tuple[int, int], Answer]) -> dict[tuple[int, int], float]:
    """Of the configurations that hive can run."""
    return {configuration: each for configuration, each in answers.items() if isinstance(each, float)}


def _spec(setting: Setting, replicas: int, stages: int) -> Any:
    document: dict[str, Any] = {
        "model": {"source": "model.py:build"},
        "data": {"source": "d.npz"},
        "train": {"batch_size": setting.batch, "steps": 1000},
        "nodes": {"min": setting.nodes, "max": setting.nodes},
        "strategy": "data_parallel" if stages == 1 else "pipeline_parallel",
        "sync": {"compression": "none"},
    }
    if stages > 1:
        document["strategy_options"] = {"stages": stages, "replicas": replicas}
    return parse(document)


def _profile(model: Transformer) -> ModelProfile:
    """Blocks of attention and feed-forward, then the head; activations as in Korthikanti et al., 2022, recomputed ones
    left aside."""
    block = 12 * model.width**2
    flops = 2.0 * block * model.tokens + 4.0 * model.width * model.tokens**2
    border = 4.0 * model.width * model.tokens
    layers = [
        LayerProfile(f"h.{index}", "Linear", block, flops, 8.5 * border, border, (), border)
        for index in range(model.layers)
    ]
    head = model.vocabulary * model.width
    layers.append(LayerProfile("head", "Linear", head, 2.0 * head * model.tokens, border, border, (), None))
    parameters = sum(layer.parameters for layer in layers)
    activations = sum(layer.activation_bytes_per_sample for layer in layers)
    return ModelProfile(
        "pytorch", "source", Family.TRANSFORMER, "", parameters, 4 * parameters, True, ("float32",), (model.tokens,),
        complexity_of(parameters), tuple(layers), Requirements(1.0, 0, 0, 1.0, "layers"), 1.0,
        peak_activation_bytes_per_sample=activations, why_not_cut="",
    )  # fmt: skip


def _cluster(setting: Setting) -> ClusterView:
    gpus = setting.gpus
    flops = gpus.sustained_flops * gpus.tensor
    memory, bandwidth = int(gpus.memory_bytes * gpus.tensor), gpus.memory_bytes_per_s * gpus.tensor
    devices = tuple(
        DeviceInfo("cuda", index, gpus.name, memory, memory, 0.0) for index in range(setting.ranks_per_node)
    )
    nodes = tuple(
        NodeView(
            NodeId(f"n{index:02}"), f"n{index:02}",
            Capacity(
                hostname=f"n{index:02}", machine_id=f"n{index:02}", platform="", python="", cores=64.0, cores_total=64,
                memory_bytes=10**12, memory_total_bytes=10**12, disk_free_bytes=0, gpus=devices,
                memory_bandwidth=Rate(bandwidth, bandwidth, 0.0),
                families={name: FamilyRate(flops, 2e-4) for name in ("matmul", "conv", "rnn", "embedding", "tiny")},
                networks=(TrustedNetwork(NETWORK, "eth0", ""),),
            ),
            NodeLink.CONNECTED, Eligibility.OK, Activity.IDLE,
        )
        for index in range(setting.nodes)
    )  # fmt: skip
    pairs = combinations_with_replacement([node.node_id for node in nodes], 2)
    links = {(a, b): LinkEstimate(2e-5, setting.local_link if a == b else setting.link, NETWORK) for a, b in pairs}
    return ClusterView(nodes, links)


def replay(setting: Setting) -> Finding:
    answers = predicted(setting)
    return Finding("public", (*_ratios(setting, answers), _winner(setting, seconds_of(answers))))


def _ratios(setting: Setting, answers: Mapping[tuple[int, int], Answer]) -> list[Figure]:
    """Of each configuration, predicted over measured."""
    found = seconds_of(answers)
    first = next(iter(setting.measured))
    scale = setting.measured[first] / found[first] if first in found else math.nan
    figures = []
    for configuration, measured_s in setting.measured.items():
        replicas, stages = configuration
        name = f"{setting.name}: {replicas} replicas x {stages} stages"
        answer = answers[configuration]
        if not isinstance(answer, float):
            note = f"measured, not predicted: {'; '.join(answer)}"
            figures.append(Figure(f"{name}: left out", measured_s, "s", note=note))
            continue
        ratio = answer / measured_s
        note = f"predicted {answer:.3g} s, measured {measured_s:.3g} s; calibrated {scale * ratio:.2f}"
        figures.append(Figure(name, ratio, "x", note=note))
    return figures


def _winner(setting: Setting, found: Mapping[tuple[int, int], float]) -> Figure:
    """What following the prediction would have cost against the best of all that were measured."""
    if len(found) < 2:
        gate = Gate(Bound.AT_LEAST, 2) if setting.claimed else None
        note = "the others are left out, see above"
        return Figure(f"{setting.name}: no choice to judge", len(found), "configurations", gate=gate, note=note)
    picked = min(found, key=lambda configuration: found[configuration])
    best = min(setting.measured, key=lambda configuration: setting.measured[configuration])
    regret = 100 * (setting.measured[picked] / setting.measured[best] - 1)
    gate = Gate(Bound.EXACTLY, 0) if setting.claimed else None
    note = f"predicted {picked[0]} x {picked[1]}, measured {best[0]} x {best[1]}"
    return Figure(f"{setting.name}: top-1 regret", regret, "%", gate=gate, note=note)


def scaling() -> Finding:
    """What many GPUs lose of perfect scaling (more epochs at a larger batch, too), and what recomputing costs."""
    figures = []
    base = MLPERF_MINUTES[8]
    for gpus, minutes in MLPERF_MINUTES.items():
        ratio = base * 8 / gpus / minutes
        figures.append(Figure(f"MLPerf v4.0 ResNet-50, {gpus} H100: perfect scaling / measured", ratio, "x"))
    for name, (full_s, selective_s) in CALCULON_S.items():
        measured = full_s / selective_s
        note = f"predicted {RECOMPUTE_FACTOR:.2f}, measured {measured:.2f}"
        figures.append(
            Figure(f"{name}: cost of recomputing, predicted / measured", RECOMPUTE_FACTOR / measured, "x", note=note)
        )
    return Finding("public", tuple(figures))


def left_out() -> Finding:
    rows = (Figure(f"{name}: left out", value, unit, note=f"measured: {why}") for name, value, unit, why in NOT_ASKED)
    return Finding("public", tuple(rows))


def traces(folder: Path | None) -> Finding:
    if folder is None:
        return Finding("traces", (), error=f"not run: needs --adaptdl FOLDER ({TRACES})")
    found = applications(folder)
    figures = [
        Figure(f"AdaptDL {each.name}: fitted on up to 4 replicas, error beyond", 100 * each.error, "%",
               note=f"{each.rows} rows, {each.fitted} fitted with {each.fit_error:.1%}")
        for each in found
    ]  # fmt: skip
    worst = max(each.error for each in found)
    rows = sum(each.rows for each in found)
    figures.append(Figure("AdaptDL: rows read", rows, gate=Gate(Bound.EXACTLY, PUBLISHED_ROWS)))
    figures.append(Figure("AdaptDL: the worst application", 100 * worst, "%", gate=Gate(Bound.BELOW, 14.6)))
    return Finding("traces", tuple(figures))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adaptdl", type=Path, metavar="FOLDER", help=f"{TRACES}; without it its gate fails")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    findings = [*(replay(setting) for setting in SETTINGS), left_out(), scaling(), traces(asked.adaptdl)]
    print(table(findings))
    if asked.json:
        asked.json.write_text(json.dumps(document(findings, {}), indent=1) + "\n", encoding="utf-8")
    return 0 if all(finding.passed for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
