"""Which strategy wins on which network: four machines as network namespaces, their links shaped, three models.

Every strategy is forced in turn with its own best plan among the four nodes and timed by its steps; beside it stands
what `auto` would have taken. Needs root, and brings down what it makes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.cluster import run_timed
from bench.report import Figure, Finding
from bench.stage import Stage
from bench.strategy_jobs import CNN, GPT_SMALL, HYBRID, MLP, SHARDED, TENSOR, name_of, steps_for
from bench.workloads import Strategy, Workload, write
from tests.e2e.cluster import until
from tests.netns.lan_cluster import LanCluster
from tests.netns.machines import lan, why_not

NODES = ("n1", "n2", "n3", "n4")
CPUS = 0.45  # of each: together less than two cores
MEMORY = "2GiB"
FAST, MIDDLE, SLOW = "1gbit", "100mbit", "20mbit"
NETWORKS: Mapping[str, tuple[str, ...]] = {
    "1 Gbit/s": (FAST,) * 4,
    "100 Mbit/s": (MIDDLE,) * 4,
    "1 Gbit/s, one machine at 20 Mbit/s": (FAST, FAST, FAST, SLOW),
}
WIDE = replace(MLP, name="MLP 2.2 M", args={"hidden": 1400}, batch=256)  # many parameters, little to compute
SMALL_CNN = replace(CNN, batch=256)  # few parameters, much to compute
THREE = (WIDE, SMALL_CNN, GPT_SMALL)
STRATEGIES: tuple[Strategy, ...] = ("single_node", "data_parallel", "pipeline_parallel", HYBRID, SHARDED, TENSOR)
RUN_S = 4.0
LONG = "train.steps=100000"  # so that `auto` weighs steps, as they are what is compared, and not the start
AUTO_PLANS = {"model_parallel": name_of(TENSOR)}  # shards are taken only where the model does not fit a node


@dataclass(frozen=True, slots=True)
class Row:
    """One model on one network. `steps_s`: measured seconds of a step by strategy; `nodes`: on which, rank by rank;
    `refused`: why there is none."""

    network: str
    model: str
    auto: str
    steps_s: Mapping[str, float]
    predicted_s: Mapping[str, float]
    nodes: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str]

    @property
    def winner(self) -> str:
        """Raises ValueError when nothing ran."""
        return min(self.steps_s, key=lambda name: self.steps_s[name])

    @property
    def auto_factor(self) -> float | None:
        """Time of what `auto` takes over that of the winner; None when it was not measured. Forced with its options a
        strategy is another plan than the one `auto` would make of it, so only the one without counts."""
        taken = self.steps_s.get(AUTO_PLANS.get(self.auto, self.auto))
        return None if taken is None else taken / self.steps_s[self.winner]


def networks(stage: Stage) -> Finding:
    if reason := why_not():
        raise RuntimeError(reason)
    rows: list[Row] = []
    calibration = stage.subfolder("netns") / "calibration"  # the machines are one machine: measured once
    for name, rates in list(NETWORKS.items())[-1:] if stage.quick else NETWORKS.items():
        rows += _on(stage, name, rates, calibration)
    table = markdown(rows)
    stage.tell(table)
    return Finding("netns", tuple(map(_figure, rows)), {"rows": [asdict(row) for row in rows], "markdown": table})


def _on(stage: Stage, network: str, rates: tuple[str, ...], calibration: Path) -> list[Row]:
    folder = stage.subfolder(f"netns/{len(list((stage.folder / 'netns').iterdir()))}")
    with lan(1 + len(NODES)) as made:
        office = LanCluster(folder, calibration, lan=made)
        try:
            for number, rate in enumerate(rates, 1):
                made.shape(number, rate)
            office.coordinator_on(made[0], "--no-advertise")
            for number, name in enumerate(NODES, 1):
                flags = ("--no-advertise", "--trusted-lan", made[number].interface)
                office.start_node(name, CPUS, MEMORY, *flags, prefix=made[number].prefix)
            office.wait_ready(len(NODES))
            pairs = len(NODES) * (len(NODES) - 1) // 2
            until(lambda: len(office.ask("nodes")["links"]) == pairs, "every pair of nodes is measured", 120.0)
            return [_row(stage, office, network, model) for model in (THREE[-1:] if stage.quick else THREE)]
        finally:
            office.close()


def _row(stage: Stage, office: LanCluster, network: str, model: Workload) -> Row:
    measured: dict[str, float] = {}
    predicted: dict[str, float] = {}
    used: dict[str, tuple[str, ...]] = {}
    refused: dict[str, str] = {}
    names = {node["id"]: str(node["name"]) for node in office.show_nodes()}
    auto = _planned(office, stage, model, "auto", LONG)
    for strategy in STRATEGIES[:3] if stage.quick else STRATEGIES:
        name = name_of(strategy)
        plan = _planned(office, stage, model, strategy)
        if "error" in plan:
            refused[name] = str(plan["error"]["message"])
            continue
        steps = steps_for(stage.either(4, 1) / 4 * RUN_S, float(plan["plan"]["estimate"]["step_s"]), most=500)
        written = write(model, strategy, NODES, stage.subfolder("jobs"))
        run = run_timed(office, written, "nodes.min=1", f"train.steps={steps}")
        measured[name], predicted[name] = run.measured_s, run.predicted_s
        used[name] = tuple(names[rank[0]] for rank in run.cut)
        stage.tell(
            f"{network}, {model.name}, {name} on {', '.join(used[name])}, {steps} steps: predicted "
            f"{1e3 * run.predicted_s:.0f}, measured {1e3 * run.measured_s:.0f} ms a step"
        )
    return Row(network, model.name, str(auto["plan"]["strategy"]), measured, predicted, used, refused)


def _planned(office: LanCluster, stage: Stage, model: Workload, strategy: Strategy, *sets: str) -> dict[str, Any]:
    written = write(model, strategy, NODES, stage.subfolder("jobs"))
    flags = [part for each in ("nodes.min=1", *sets) for part in ("--set", each)]
    done = office.hive("plan", str(written.job), *flags, "-o", "json", check=False)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _figure(row: Row) -> Figure:
    factor = "not measured" if row.auto_factor is None else f"{row.auto_factor:.2f} times that"
    note = f"fastest: {row.winner}; auto takes {row.auto}: {factor}"
    return Figure(f"{row.network}, {row.model}", 1e3 * row.steps_s[row.winner], "ms a step", note=note)


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/strategies.md: milliseconds of a step, the fastest in bold."""
    names = list(dict.fromkeys(name for row in rows for name in (*row.steps_s, *row.refused)))
    head = ["network", "model", *names, "`auto` takes"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [_cell(row, name) for name in names]
        lines.append(f"| {row.network} | {row.model} | {' | '.join(cells)} | {row.auto} |")
    return "\n".join(lines)


def _cell(row: Row, name: str) -> str:
    if name not in row.steps_s:
        return "not possible"
    shown = f"{1e3 * row.steps_s[name]:.3g}" if row.steps_s[name] < 1 else f"{1e3 * row.steps_s[name]:.0f}"
    return f"**{shown}**" if name == row.winner else shown
