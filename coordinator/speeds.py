"""What finished jobs teach about predictions: pure bookkeeping over `outcome` events, in the order of the log.

Owns averages of ln(measured / predicted) and what planners make of them (protos.plan.Learned): per node, family of
layers and kind of work; per node, model and kind of work; per network and kind of work; and the step that a combination
of job and placement took. What models need of memory is learned in coordinator/memory_needs.py, from the same events.
docs/planner.md says how a prediction is put together. Refuses outcomes that teach nothing and those of another cost
model. Bounded: what was not seen for longest is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeVar

from coordinator.memory_needs import MemoryNeeds, used_bytes
from protos.ids import NodeId
from protos.plan import Factors, Learned, Plan, RankCost, Work
from protos.work import StepTimes, Usage
from strategies.cost import COST_MODEL_VERSION
from strategies.links import LOOPBACK

LIMIT = 2.0  # of a logarithm: further off, something else was wrong
LEAST_WEIGHT = 0.1  # of a new outcome
FIRST_WEIGHT = 0.5  # of the very first: half way from what the formulas say
NOTICEABLE = 0.02  # of a step: shorter waits say nothing about a network
FULL = 0.9  # of its cap: a rank that used more in a step was held up by it
LEAST_STAGE = 0.25  # of what ranks compute on average: a stage with less says nothing about the model's other layers
LEAST_SHARE = 0.1  # of a predicted part that is left when the other part explains all that was measured
MOST_KEYS = 2_500  # of each kind: what planners read of them is put together anew after every outcome

K = TypeVar("K")
Times = Usage | StepTimes


@dataclass(frozen=True, slots=True)
class Average:
    """Exponentially weighted mean and variance of logarithms: 1/n at first, never less than LEAST_WEIGHT."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def with_(self, value: float, first: float = FIRST_WEIGHT) -> Average:
        weight = first if not self.count else max(LEAST_WEIGHT, 1 / (self.count + 1))
        off = value - self.mean
        return Average(self.mean + weight * off, (1 - weight) * (self.variance + weight * off * off), self.count + 1)

    @property
    def factor(self) -> float:
        return math.exp(self.mean)


@dataclass(slots=True)
class Speeds:
    """`apply` outcomes, ask `learned`. Keys of `_speeds` end with the part of the time: work or overhead."""

    _speeds: dict[tuple[NodeId, str, Work, str], Average] = field(default_factory=dict)
    _models: dict[tuple[NodeId, str, Work], Average] = field(default_factory=dict)
    _networks: dict[tuple[str, Work], Average] = field(default_factory=dict)
    _steps: dict[str, Average] = field(default_factory=dict)
    _memory: MemoryNeeds = field(default_factory=MemoryNeeds)
    _made: Learned | None = None

    def apply(self, payload: Mapping[str, Any]) -> bool:
        """One outcome; True when it taught something. Raises KeyError, TypeError, ValueError for one that is odd."""
        if not payload["counted"] or "basis" not in payload or payload["cost_model_version"] != COST_MODEL_VERSION:
            return False
        self._made = None
        basis, step_s = payload["basis"], float(payload["measured_step_s"])
        work = Work(basis["work"])
        for rank in payload["ranks"]:
            self._rank(rank, work, str(basis["model"]))
        if (network := payload.get("network")) is not None:
            off = float(network["measured_s"]) / max(float(network["predicted_s"]), 1e-9)
            key = (str(network["name"]), work)
            before = self._networks.get(key, Average())
            # the factor that the prediction was made with: jobs planned meanwhile may have changed it since. Events of
            # older versions do not say it
            predicted_with = float(network.get("factor", before.factor))
            _put(self._networks, key, before.with_(_clipped(math.log(off * predicted_with))))
        key_of_steps = str(basis["combination"])
        known = self._steps.get(key_of_steps, Average())
        _put(self._steps, key_of_steps, known.with_(math.log(step_s), first=1.0))
        for used in payload.get("memory", ()):  # not there in events of older versions
            self._memory.ended_well(used)
        return True

    def ran_out(self, payload: Mapping[str, Any]) -> bool:
        """A worker ran out of memory; as `apply`."""
        self._made = None
        return self._memory.ran_out(payload)

    def _rank(self, rank: Mapping[str, Any], work: Work, model: str) -> None:
        node, measured_s = NodeId(str(rank["node"])), float(rank["measured_s"])
        if not measured_s > 0:
            return
        overhead_s = float(rank["overhead_s"])
        work_s = max(0.0, float(rank["predicted_s"]) - overhead_s) / float(rank["work_factor"])
        overhead_s /= float(rank["overhead_factor"])
        of_model = (node, model, work)
        total = _clipped(math.log(measured_s / (overhead_s + work_s)))
        _put(self._models, of_model, self._models.get(of_model, Average()).with_(total, first=1.0))
        family = str(rank["family"])
        now = {part: self._speeds.get((node, family, work, part), Average()) for part in ("work", "overhead")}
        if overhead_s > work_s:
            part, own_s, others_s = "overhead", overhead_s, work_s * now["work"].factor
        else:
            part, own_s, others_s = "work", work_s, overhead_s * now["overhead"].factor
        value = _clipped(math.log(max(measured_s - others_s, LEAST_SHARE * measured_s) / own_s))
        _put(self._speeds, (node, family, work, part), now[part].with_(value))

    def learned(self) -> Learned:
        """For planners; the same object until something is learned."""
        if self._made is None:
            self._made = self._now()
        return self._made

    def _now(self) -> Learned:
        unknown = Average()
        speeds = {
            key: Factors(*(self._speeds.get((*key, part), unknown).factor for part in ("work", "overhead")))
            for key in {(node, family, work): None for node, family, work, _ in self._speeds}
        }
        models, networks, steps = _factors(self._models), _factors(self._networks), _factors(self._steps)
        return Learned(speeds, models, networks, steps, dict(self._memory.factors))

    def of_node(self, node_id: NodeId) -> dict[str, Any]:
        """For people: by family and kind of work, how many times longer than measured at joining, and how sure."""
        return {
            f"{family}/{work}/{part}": {
                "factor": each.factor,
                "spread": math.sqrt(each.variance),
                "jobs": each.count,
            }
            for (node, family, work, part), each in sorted(self._speeds.items())
            if node == node_id
        }


def computing_s(plan: Plan, times: Mapping[int, StepTimes]) -> dict[int, float]:
    """What ranks of a group that runs now compute in a step, by rank: of those that have said it and tell something of
    their nodes."""
    return {number: alone_s(rank, times[number]) for number, rank in _telling(plan).items() if number in times}


def lesson(plan: Plan, usages: Sequence[tuple[int, Usage]], measured_step_s: float) -> dict[str, Any]:
    """What `Speeds.apply` reads of an outcome: predicted and measured beside each other. `usages` by rank.

    A rank that shares single layers with others waits where it cannot be told apart from computing: it teaches the step
    only. What ranks waited for is what their step took beyond computing alone, as it is predicted. Between machines a
    step in which a rank used all of its cap says nothing about the network: it was the cap that held it up.
    """
    estimate, basis = plan.estimate, plan.estimate.basis
    if basis is None:
        return {}
    said = dict(usages)
    pairs = [(rank, said[k]) for k, rank in enumerate(estimate.ranks) if k in said and not _tensor(plan)]
    found: dict[str, Any] = {
        "basis": {
            "work": basis.work.value,
            "model": basis.model,
            "combination": basis.combination,
            "modelled_step_s": basis.modelled_step_s,
            "remembered": basis.remembered,
        },
        "ranks": [_compared(rank, said[k]) for k, rank in _telling(plan).items() if k in said],
        "memory": used_bytes(plan, usages),
    }
    name = plan.coordination_plan.network
    capped = name != LOOPBACK and any(_at_its_cap(rank, usage) for rank, usage in pairs)
    if len(pairs) > 1 and len(pairs) == len(estimate.ranks) and not capped:
        predicted_s = basis.modelled_step_s - max(rank.compute_s for rank, _ in pairs)
        waited_s = max(0.0, min(_step_s(usage) - alone_s(rank, usage) for rank, usage in pairs))
        least_s = NOTICEABLE * measured_step_s
        if max(predicted_s, waited_s) > least_s > 0:
            found["network"] = {
                "name": name,
                "predicted_s": max(predicted_s, least_s),
                "measured_s": max(waited_s, least_s),
            }
            if basis.network_factor is not None:
                found["network"]["factor"] = basis.network_factor
    return found


def _tensor(plan: Plan) -> bool:
    """Its ranks wait inside their layers."""
    return plan.layout is not None and plan.layout.tensor > 1


def _telling(plan: Plan) -> dict[int, RankCost]:
    """Ranks whose computing says something of their nodes, by number."""
    estimate, basis = plan.estimate, plan.estimate.basis
    if basis is None or _tensor(plan) or not estimate.ranks:
        return {}
    average_s = fmean(rank.compute_s for rank in estimate.ranks)
    least_of_model_s = LEAST_STAGE * average_s if basis.work is Work.STAGE else 0.0
    return {k: rank for k, rank in enumerate(estimate.ranks) if rank.compute_s >= least_of_model_s}


def _compared(rank: RankCost, usage: Times) -> dict[str, Any]:
    return {
        "node": rank.node_id,
        "family": rank.family,
        "predicted_s": rank.compute_s,
        "overhead_s": rank.overhead_s,
        "measured_s": alone_s(rank, usage),
        "work_factor": rank.learned.work,
        "overhead_factor": rank.learned.overhead,
    }


def alone_s(rank: RankCost, usage: Times) -> float:
    """What it would have computed without waiting in between. A quota that it did not use while it waited let it
    compute faster than it can go on: CPU time over the cores that it is granted is the least it takes alone."""
    return max(usage.step_compute_s, usage.step_cpu_s / rank.cores if rank.cores > 0 else 0.0)


def _at_its_cap(rank: RankCost, usage: Times) -> bool:
    return rank.cores > 0 and usage.step_cpu_s + usage.step_carrying_s > FULL * rank.cores * _step_s(usage)


def _step_s(usage: Times) -> float:
    return usage.step_compute_s + usage.step_sync_s


def _clipped(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"no logarithm: {value}")
    return max(-LIMIT, min(LIMIT, value))


def _factors(kept: Mapping[K, Average]) -> dict[K, float]:
    return {key: each.factor for key, each in kept.items()}


def _put(averages: dict[K, Average], key: K, value: Average) -> None:
    """The newest last; the oldest gives way."""
    averages.pop(key, None)
    averages[key] = value
    if len(averages) > MOST_KEYS:
        del averages[next(iter(averages))]
