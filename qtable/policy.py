"""Which action a job takes: the best corrected prediction, and rarely another one that is nearly as good.

Exploring never wastes a user's job: epsilon acts only inside a band around the best, on actions that are not masked,
and only while the ledger of what exploring has cost stays under a hundredth of all job time. Pure: the generator is
passed in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qtable.state import ACTIONS

EPSILON = 0.1
BAND = 0.10
LEDGER_SHARE = 0.01
FAR = 3.0  # an action predicted to take more than this many times the best is never explored


@dataclass(frozen=True, slots=True)
class Ledger:
    """Cumulative time of finished jobs, and the predicted loss of the explorations among them, in seconds."""

    job_s: float = 0.0
    loss_s: float = 0.0

    def affords(self, loss_s: float) -> bool:
        return self.loss_s + loss_s <= LEDGER_SHARE * self.job_s

    def charged(self, loss_s: float) -> Ledger:
        return Ledger(self.job_s, self.loss_s + loss_s)

    def credited(self, job_s: float) -> Ledger:
        return Ledger(self.job_s + job_s, self.loss_s)


@dataclass(frozen=True, slots=True)
class Choice:
    """`utility` per allowed action is Rhat + residual; `propensity` the probability with which `action` was taken."""

    action: str
    reason: str
    propensity: float
    explored: bool
    expected_loss_s: float
    utility: Mapping[str, float]


def choose(
    predictions: Mapping[str, float],
    mask: Collection[str],
    residuals: Mapping[str, float],
    rng: random.Random,
    ledger: Ledger,
    band: float = BAND,
    epsilon: float = EPSILON,
) -> Choice:
    """`predictions`: seconds per feasible action; `mask`: actions among them that must not be explored.

    Greedy on U(a) = ln(T_best / T(a)) + residual(a). Raises ValueError when nothing is feasible.
    """
    feasible = [action for action in ACTIONS if action in predictions]
    if not feasible or any(not (0 < predictions[action] < math.inf) for action in feasible):
        raise ValueError(f"a choice needs at least one action with a positive, finite prediction: {dict(predictions)}")
    best_s = min(predictions[action] for action in feasible)
    utility = {a: math.log(best_s / predictions[a]) + residuals.get(a, 0.0) for a in feasible}
    greedy = max(feasible, key=lambda action: (utility[action], ACTIONS.index(action)))  # a tie goes to single_node
    near = [greedy]
    for action in feasible:
        loss_s = _loss_s(predictions, residuals, greedy, action)
        in_band = utility[action] >= utility[greedy] - math.log1p(band)
        far = predictions[action] > FAR * best_s
        if action != greedy and in_band and not far and action not in mask and ledger.affords(loss_s):
            near.append(action)
    if len(near) == 1:
        return Choice(greedy, _why(greedy, predictions, utility), 1.0, False, 0.0, utility)
    share = epsilon / len(near)
    draw = rng.random()
    taken = near[1 + min(int(draw / share), len(near) - 2)] if draw < share * (len(near) - 1) else greedy
    if taken == greedy:
        return Choice(greedy, _why(greedy, predictions, utility), 1.0 - share * (len(near) - 1), False, 0.0, utility)
    loss_s = _loss_s(predictions, residuals, greedy, taken)
    reason = f"tried although {greedy} is predicted {loss_s:.3g} s faster: within {band:.0%} of it"
    return Choice(taken, reason, share, True, loss_s, utility)


def _loss_s(predictions: Mapping[str, float], residuals: Mapping[str, float], greedy: str, other: str) -> float:
    """Corrected prediction of `other` minus that of `greedy`: T e^-residual, as a residual is ln(T_pred / T_meas)."""
    after = {action: predictions[action] * math.exp(-residuals.get(action, 0.0)) for action in (greedy, other)}
    return max(0.0, after[other] - after[greedy])


def _why(greedy: str, predictions: Mapping[str, float], utility: Mapping[str, float]) -> str:
    if len(predictions) == 1:
        return "the only feasible strategy"
    if predictions[greedy] <= min(predictions.values()):
        return "the shortest prediction"
    return f"earlier jobs like this one corrected its prediction by {-_correction(greedy, predictions, utility):+.0%}"


def _correction(action: str, predictions: Mapping[str, float], utility: Mapping[str, float]) -> float:
    """The share by which the correction shortens the prediction of `action`."""
    residual = utility[action] - math.log(min(predictions.values()) / predictions[action])
    return 1.0 - math.exp(-residual)
