"""Which action a job takes: the best corrected prediction, and rarely another one that is nearly as good.

Exploring never wastes a user's job. Where the job is long and the first two or three are within their uncertainty, a
few real steps of each are tried first (qtable/probing.py). Otherwise epsilon acts only inside a band around the best,
and only while the ledger of what exploring has cost stays under a hundredth of all
job time. Pure: the generator is passed in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from qtable.probing import Arm, Belief, Trials, belief, expected_loss_s, trials, worth_switching
from qtable.state import ACTIONS

EPSILON = 0.1
BAND = 0.10
LEDGER_SHARE = 0.01
FAR = 3.0  # an action predicted to take more than this many times the best is masked: never explored, nor chosen


@dataclass(frozen=True, slots=True)
class Ledger:
    """Cumulative time of jobs that ended, and the predicted loss of the explorations among them, in seconds."""

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
    """`utility` per action that is not masked is Rhat + residual; `propensity` the probability with which `action`
    was taken.

    `trials`: actions to be tried in this order for `trial_steps` steps each, the first is `action`; empty when none.
    `expected_loss_s`: E[max(0, T_action - min of the others)]. `charge_s`: for the ledger, 0 unless `explored`.
    """

    action: str
    reason: str
    propensity: float
    explored: bool
    expected_loss_s: float
    utility: Mapping[str, float]
    trials: tuple[str, ...] = ()
    trial_steps: int = 0
    charge_s: float = 0.0


def masked(arms: Mapping[str, Arm], kept: str = "") -> frozenset[str]:
    """Whatever is predicted to take more than FAR times the best, whatever its residual: residuals are of a whole cell
    of jobs and not trusted that far. What was measured in this very combination is no prediction. `kept`: what runs, or
    is asked for by name."""
    best_s = min((arm.seconds for arm in arms.values()), default=0.0)
    return frozenset(
        name for name, arm in arms.items() if arm.seconds > FAR * best_s and not arm.measured and name != kept
    )


def choose(
    arms: Mapping[str, Arm],
    residuals: Mapping[str, float],
    rng: random.Random,
    ledger: Ledger,
    *,
    switch_s: float,
    running: str = "",
    probes: bool = True,
    band: float = BAND,
    epsilon: float = EPSILON,
) -> Choice:
    """`arms`: the feasible actions as predicted; the others are masked by not being there. An action may have more
    ways, by names that are no actions; `masked` ones are not taken.

    Greedy on U(a) = ln(T_best / T(a)) + residual(a). `switch_s`: what changing a running job from one action to another
    costs. `running`: the action it runs now; then the times are those of what is left of the job, it is left only
    where that saves more than twice the switch, and nothing is drawn. Raises ValueError when nothing is feasible.
    """
    feasible = [*(name for name in arms if name not in ACTIONS), *(action for action in ACTIONS if action in arms)]
    if not feasible or any(not (0 < arms[action].seconds < math.inf) for action in feasible):
        raise ValueError(f"a choice needs at least one action with a positive, finite prediction: {dict(arms)}")
    best_s = min(arms[action].seconds for action in feasible)
    feasible = [action for action in feasible if action not in masked(arms, running)]
    beliefs = {action: belief(arms[action], residuals.get(action, 0.0)) for action in feasible}
    utility = {action: math.log(best_s / beliefs[action].median_s) for action in feasible}
    ranked = sorted(feasible, key=lambda action: (-utility[action], -feasible.index(action)))  # a tie: single_node
    greedy, why = ranked[0], _why(ranked[0], arms, beliefs)
    if running in beliefs and greedy != running:
        gain_s = beliefs[running].median_s - beliefs[greedy].median_s
        if not worth_switching(gain_s, switch_s):
            why = f"{greedy} would save {gain_s:.3g} s, less than twice what changing to it costs"
            greedy, ranked = running, [running, *(action for action in ranked if action != running)]
    found = trials(arms, beliefs, ranked, switch_s, running) if probes else Trials()
    if found.actions:
        action, loss_s = found.actions[0], expected_loss_s(found.actions[0], beliefs)
        return Choice(action, _tried(found), 1.0, False, loss_s, utility, found.actions, found.steps)
    near = [greedy]
    for action in feasible if not running else ():
        in_band = utility[action] >= utility[greedy] - math.log1p(band)
        affordable = ledger.affords(_charge_s(beliefs, greedy, action))
        if action != greedy and in_band and affordable:
            near.append(action)
    share = epsilon / len(near)
    kept = 1.0 - share * (len(near) - 1)
    draw = rng.random() if len(near) > 1 else 1.0
    if draw >= share * (len(near) - 1):
        return Choice(greedy, why, kept, False, expected_loss_s(greedy, beliefs), utility)
    taken = near[1 + min(int(draw / share), len(near) - 2)]
    charge_s = _charge_s(beliefs, greedy, taken)
    reason = f"tried although {greedy} is predicted {charge_s:.3g} s faster: within {band:.0%} of it"
    return Choice(taken, reason, share, True, expected_loss_s(taken, beliefs), utility, charge_s=charge_s)


def _charge_s(beliefs: Mapping[str, Belief], greedy: str, other: str) -> float:
    """Corrected prediction of `other` minus that of `greedy`."""
    return max(0.0, beliefs[other].median_s - beliefs[greedy].median_s)


def _tried(found: Trials) -> str:
    first, *others = found.actions
    then = f", then {', '.join(others)}" if others else ""
    each = " each" if others else ""
    return (
        f"tries {first}{then} for {found.steps} steps{each}: too close to call by prediction, knowing their steps is "
        f"expected to save {found.gain_s:.3g} s and costs {found.cost_s:.3g} s"
    )


def _why(greedy: str, arms: Mapping[str, Arm], beliefs: Mapping[str, Belief]) -> str:
    arm = arms[greedy]
    if len(arms) == 1:
        return "the only feasible strategy"
    if arm.measured:
        return "the same was measured before"
    if arm.seconds <= min(other.seconds for other in arms.values()):
        return "the shortest prediction"
    return f"earlier jobs like this one corrected its prediction by {beliefs[greedy].median_s / arm.seconds - 1:+.0%}"


__all__ = ["BAND", "EPSILON", "FAR", "LEDGER_SHARE", "Arm", "Choice", "Ledger", "choose"]
