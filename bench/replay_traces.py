"""The AdaptDL traces against the ring and the overlap of strategies/cost.py: fitted on few replicas, judged on the
rest. Round trips are not fitted: hive measures them.

Reads a folder of petuum/adaptdl, branch osdi21-artifact: `simulator/traces`, with `placements.csv` (replicas on each
node as digits) and `scalability.csv` per application: 7,103 rows of local batch, step and synchronisation time on
T4 GPUs (Qiao et al., Pollux, OSDI'21; Apache-2.0; not part of this repository). Refuses a row it cannot read.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import fmean

from strategies.cost import mix, ring_s

FITTED_REPLICAS = 4
RTT_S, LOCAL_RTT_S = 1e-4, 1e-5  # of a data centre's network, of a machine
_OVERLAPS = (1.1, 1.5, 3.0)  # from which the search starts
_TURNS, _FIRST_STRIDE, _LEAST_STRIDE = 200, 1.0, 0.005  # of the search, in logarithms


@dataclass(frozen=True, slots=True)
class Row:
    nodes: int
    replicas: int
    local_batch: int
    step_s: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Seconds: overhead and per sample; being in a group and gradients over the wire, in a node and between nodes."""

    overhead_s: float
    sample_s: float
    local_group_s: float
    local_wire_s: float
    group_s: float
    wire_s: float
    overlap: float

    def step_s(self, row: Row) -> float:
        compute_s = self.overhead_s + self.sample_s * row.local_batch
        if row.replicas == 1:
            return compute_s
        group_s, wire_s, rtt_s = (
            (self.group_s, self.wire_s, RTT_S)
            if row.nodes > 1
            else (self.local_group_s, self.local_wire_s, LOCAL_RTT_S)
        )
        network_s = group_s + ring_s(row.replicas, wire_s, rtt_s, 1.0)
        return mix(compute_s, network_s, min(10.0, max(1.0, self.overlap)))


@dataclass(frozen=True, slots=True)
class Application:
    name: str
    rows: int
    fitted: int
    fit_error: float
    error: float  # mean of |predicted / measured - 1| over the rows with more replicas


def applications(folder: Path) -> list[Application]:
    """Raises FileNotFoundError where there are no traces."""
    found = sorted(path.parent for path in folder.glob("*/placements.csv"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no */placements.csv: give simulator/traces of petuum/adaptdl")
    return [judged(path.name, list(read(path))) for path in found]


def read(folder: Path) -> Iterator[Row]:
    with (folder / "placements.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            replicas = [int(digit) for digit in row["placement"]]
            yield Row(len(replicas), sum(replicas), int(float(row["local_bsz"])), float(row["step_time"]))
    with (folder / "scalability.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            count = int(row["num_replicas"])
            yield Row(int(row["num_nodes"]), count, int(float(row["local_bsz"])), float(row["step_time"]))


def judged(name: str, rows: Sequence[Row]) -> Application:
    few = [row for row in rows if row.replicas <= FITTED_REPLICAS]
    found = fitted(few)
    rest = [row for row in rows if row.replicas > FITTED_REPLICAS]
    return Application(name, len(rows), len(few), error(found, few), error(found, rest))


def error(found: Fit, rows: Sequence[Row]) -> float:
    return fmean(abs(found.step_s(row) / row.step_s - 1) for row in rows)


def fitted(rows: Sequence[Row]) -> Fit:
    """Least mean square of ln(predicted / measured), from several beginnings."""
    alone = [row for row in rows if row.replicas == 1] or rows
    least_s, slope_s = min(row.step_s for row in alone), max(row.step_s / row.local_batch for row in alone) / 2
    starts = [Fit(least_s / 2, slope_s, 0.1 * least_s, 0.1 * least_s, least_s / 2, least_s / 2, g) for g in _OVERLAPS]
    found = [_descended([math.log(value) for value in astuple(start)], rows) for start in starts]
    return _fit_of(min(found)[1])


def _descended(values: list[float], rows: Sequence[Row]) -> tuple[float, list[float]]:
    """Steps along one parameter at a time, that halve where none helps. The loss and where it was reached."""
    best, stride = _loss(values, rows), _FIRST_STRIDE
    for _ in range(_TURNS):
        before = best
        for index in range(len(values)):
            for sign in (1, -1):
                trial = [*values]
                trial[index] += sign * stride
                loss = _loss(trial, rows)
                if loss < best:
                    best, values = loss, trial
                    break
        if best == before:
            stride /= 2
            if stride < _LEAST_STRIDE:
                break
    return best, values


def _fit_of(values: Sequence[float]) -> Fit:
    return Fit(*(math.exp(value) for value in values))


def _loss(values: Sequence[float], rows: Sequence[Row]) -> float:
    found = _fit_of(values)
    return fmean(math.log(found.step_s(row) / row.step_s) ** 2 for row in rows)
