"""What learning was worth, by progressive validation: each job predicted with what was known before it, then measured.

Owns the bookkeeping over decisions and outcomes in the order of the log (Dawid, 1984), and the estimate of what another
policy would have taken: self-normalised inverse propensity (Swaminathan and Joachims, 2015) over the jobs where that
policy would have done what was done. Refuses to judge decisions that were forced. Pure: it is told, it reads nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from qtable.state import ACTIONS

ALL = "all"


@dataclass(frozen=True, slots=True)
class Decided:
    """A choice: seconds per feasible action as predicted, and the residuals that were known when it was made."""

    predictions: Mapping[str, float]
    residuals: Mapping[str, float]
    taken: str
    propensity: float
    forced: bool

    def best(self, learned: bool) -> str:
        """The action with the shortest prediction, corrected or not; a tie goes to the last of ACTIONS."""
        return max(
            (action for action in ACTIONS if action in self.predictions),
            key=lambda action: (
                (self.residuals.get(action, 0.0) if learned else 0.0) - math.log(self.predictions[action]),
                ACTIONS.index(action),
            ),
        )

    @property
    def usable(self) -> bool:
        times = self.predictions.values()
        return (
            self.taken in self.predictions and all(0 < each < math.inf for each in times) and 0 < self.propensity <= 1
        )


@dataclass(frozen=True, slots=True)
class _Finished:
    action: str
    error: float  # ln(T_pred / T_meas)
    residual: float


@dataclass(slots=True)
class Evaluation:
    """Tell it every decision and every counted outcome in the order of the log, then ask for the summary."""

    _decided: dict[str, Decided] = field(default_factory=dict)
    _finished: list[_Finished] = field(default_factory=list)
    _paid: list[tuple[Decided, float]] = field(default_factory=list)  # ln(T_meas / shortest prediction)
    decisions: int = 0
    changed: int = 0

    def decide(self, plan_id: str, decided: Decided) -> None:
        if not decided.usable:
            return
        self._decided[plan_id] = decided
        if not decided.forced and len(decided.predictions) > 1:
            self.decisions += 1
            self.changed += decided.best(learned=True) != decided.best(learned=False)

    def finish(self, plan_id: str, action: str, predicted_s: float, measured_s: float, residual: float) -> None:
        """`residual` of the action now, for a job whose decision is not in the log. Raises ValueError for a time that
        is not positive and finite."""
        if not (0 < predicted_s < math.inf and 0 < measured_s < math.inf):
            raise ValueError(f"a time must be positive and finite: predicted {predicted_s}, measured {measured_s}")
        decided = self._decided.pop(plan_id, None)
        if decided is not None and decided.taken == action:
            residual = decided.residuals.get(action, 0.0)
            if not decided.forced:
                best_s = min(decided.predictions.values())
                self._paid.append((decided, math.log(measured_s / best_s)))
        self._finished.append(_Finished(action, math.log(predicted_s / measured_s), residual))

    def summary(self) -> dict[str, Any]:
        by_action: dict[str, list[_Finished]] = defaultdict(list)
        for each in self._finished:
            by_action[each.action].append(each)
        rows = [_errors(action, by_action[action]) for action in ACTIONS if action in by_action]
        return {
            "jobs": len(self._finished),
            "errors": [*([_errors(ALL, self._finished)] if rows else []), *rows],
            "choices": {
                "decisions": self.decisions,
                "changed": self.changed,
                "share": self.changed / self.decisions if self.decisions else None,
            },
            "policies": [
                _policy("as it was", [(1.0, cost) for _, cost in self._paid], len(self._paid)),
                *(
                    _policy(
                        name,
                        [(1 / each.propensity, cost) for each, cost in self._paid if each.taken == each.best(learned)],
                        len(self._paid),
                    )
                    for name, learned in (("predictions alone", False), ("with what was learned", True))
                ),
            ],
        }


def _errors(action: str, finished: Sequence[_Finished]) -> dict[str, Any]:
    """Of ln T: how far off (mean and median of the absolute error) and to which side (above 0: it took less long)."""
    without = [each.error for each in finished]
    with_ = [each.error - each.residual for each in finished]
    return {
        "action": action,
        "jobs": len(finished),
        "error_without": fmean(abs(each) for each in without),
        "error_with": fmean(abs(each) for each in with_),
        "median_without": median(abs(each) for each in without),
        "median_with": median(abs(each) for each in with_),
        "bias_without": fmean(without),
        "bias_with": fmean(with_),
    }


def _policy(name: str, weighted: Sequence[tuple[float, float]], jobs: int) -> dict[str, Any]:
    """`ratio`: measured time over the shortest prediction, geometric mean, as the policy would have had it;
    `effective`: how many jobs the weights amount to (Kish)."""
    total = sum(weight for weight, _ in weighted)
    squares = sum(weight**2 for weight, _ in weighted)
    return {
        "policy": name,
        "jobs": jobs,
        "matched": len(weighted),
        "effective": total**2 / squares if weighted else 0.0,
        "ratio": math.exp(sum(weight * cost for weight, cost in weighted) / total) if weighted else None,
    }
