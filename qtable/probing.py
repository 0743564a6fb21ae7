"""When it pays to run a few real steps of several strategies before one of them is kept, and when to leave one.

Owns what is believed of an arm (a log-normal time), the expected loss of a choice, the value of trying (what knowing
the tried arms' steps would save on average, less switching and slower steps), the abort rule and the re-plan rule.
Trials train the same weights, so their steps are not lost. Pure numbers, no generator: the same question always has
the same answer. Invariant: a trial is proposed only where it is expected to save more than it costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

REPEAT_DEVIATION = 0.05  # of ln T between two runs of the same combination: what no prediction can beat
MOST_TRIALS = 3
LEAST_STEPS, MOST_STEPS = 20, 50  # of one trial
JOB_PER_PROBE = 100.0  # a job is at least so many times as long as any one of its trials
ABORT_STEPS = 20
ABORT_BELOW = 0.8
HYSTERESIS = 2.0

_SQRT_2 = math.sqrt(2)
_POINTS = 128  # of the integrals, evenly in ln t
_TAILS = 5.0  # standard deviations, beyond which a time is as good as impossible


@dataclass(frozen=True, slots=True)
class Arm:
    """One feasible action as predicted: the whole (or remaining) job, one step, how many steps.

    `deviation` of ln(T_pred / T_meas) still to be expected; `measured`: this very combination was measured before.
    """

    seconds: float
    step_s: float
    steps: int | None
    deviation: float
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Belief:
    """ln T is normal around ln `median_s`."""

    median_s: float
    deviation: float

    @property
    def mean_s(self) -> float:
        return self.median_s * math.exp(self.deviation**2 / 2)

    def above(self, seconds: float) -> float:
        """P(T > seconds)."""
        if self.deviation <= 0:
            return float(self.median_s > seconds)
        return 0.5 * math.erfc(math.log(seconds / self.median_s) / (self.deviation * _SQRT_2))

    @property
    def foreseen(self) -> Belief:
        """What will be thought of the time once it was tried: its mean is today's, its spread what a trial tells."""
        told = self.deviation**2 / math.hypot(self.deviation, REPEAT_DEVIATION) if self.deviation > 0 else 0.0
        return Belief(self.mean_s * math.exp(-(told**2) / 2), told)


@dataclass(frozen=True, slots=True)
class Trials:
    """Actions to be tried in this order, `steps` real steps each; empty when that does not pay. Choose again after one:
    what the first has shown may make the others needless."""

    actions: tuple[str, ...] = ()
    steps: int = 0
    gain_s: float = 0.0
    cost_s: float = 0.0


def belief(arm: Arm, residual: float) -> Belief:
    """A residual is ln(T_pred / T_meas); what was measured needs none."""
    return Belief(arm.seconds * math.exp(0.0 if arm.measured else -residual), arm.deviation)


def expected_loss_s(action: str, beliefs: Mapping[str, Belief]) -> float:
    """E[max(0, T_action - min of the others)] = integral of P(T_action > t) P(min of the others <= t)."""
    mine, others = beliefs[action], [other for name, other in beliefs.items() if name != action]
    if not others:
        return 0.0
    low, high = _range([mine, *others])
    found = _integral(lambda t: mine.above(t) * (1.0 - math.prod([other.above(t) for other in others])), low, high)
    return min(found, mine.mean_s)  # the integral is a sum of steps, so a little off


def trials(
    arms: Mapping[str, Arm],
    beliefs: Mapping[str, Belief],
    ranked: Sequence[str],
    switch_s: float,
    running: str = "",
) -> Trials:
    """The tries worth most among the first two or three of `ranked`, the best of which comes first, if any is worth
    more than it costs. `running`: where the job is now, "" before it has started."""
    best = Trials()
    for count in range(2, MOST_TRIALS + 1):
        group = ranked[:count]
        unknown = [name for name in group if not arms[name].measured]
        if len(group) < count or unknown in ([], [ranked[0]]):
            continue
        steps = _trial_steps(arms, beliefs, unknown, ranked[0], switch_s)
        if not steps:
            continue
        gain_s = beliefs[ranked[0]].mean_s - _expected_least_s(beliefs, unknown)
        cost_s = _cost_s(arms, unknown, ranked[0], steps, switch_s, running)
        if gain_s - cost_s > best.gain_s - best.cost_s:
            best = Trials(tuple(unknown), steps, gain_s, cost_s)
    return best


def abort(measured_s: float, runner_up_s: float) -> bool:
    """After ABORT_STEPS steps: leave a strategy whose measured throughput is below 0.8 of what the runner-up promises.
    Both are seconds of a step."""
    return measured_s * ABORT_BELOW > runner_up_s


def worth_switching(gain_s: float, cost_s: float) -> bool:
    """Of a job that runs: what the other plan saves over all that is left, against what changing to it costs."""
    return gain_s > HYSTERESIS * cost_s


def _trial_steps(
    arms: Mapping[str, Arm], beliefs: Mapping[str, Belief], tried: Sequence[str], greedy: str, switch_s: float
) -> int:
    """As many as the job is long enough for; 0 when fewer than LEAST_STEPS."""
    budget_s = beliefs[greedy].median_s / JOB_PER_PROBE
    most = MOST_STEPS
    for name in tried:
        if arms[name].steps is None:
            return 0
        left_s = budget_s - (0.0 if name == greedy else switch_s)
        most = min(most, int(max(0.0, left_s) / arms[name].step_s))
    return most if most >= LEAST_STEPS else 0


def _cost_s(
    arms: Mapping[str, Arm], tried: Sequence[str], greedy: str, steps: int, switch_s: float, running: str
) -> float:
    """Steps that are slower than those of the best, and a switch between any two, and from the last to the winner."""
    slower_s = sum(max(0.0, arms[name].step_s - arms[greedy].step_s) for name in tried)
    switches = len(tried) + (running not in ("", tried[0]))
    return switches * switch_s + steps * slower_s


def _expected_least_s(beliefs: Mapping[str, Belief], tried: Collection[str]) -> float:
    """E[min] of what will be thought of the tried ones and of what is thought of the others now."""
    known_s = min((other.mean_s for name, other in beliefs.items() if name not in tried), default=math.inf)
    foreseen = [beliefs[name].foreseen for name in tried]
    low, high = _range(foreseen)
    if low >= known_s:
        return known_s
    return low + _integral(lambda t: math.prod([each.above(t) for each in foreseen]), low, min(high, known_s))


def _range(beliefs: Sequence[Belief]) -> tuple[float, float]:
    """Below the first everything is later, above the second everything is over."""
    low = min(each.median_s * math.exp(-_TAILS * each.deviation) for each in beliefs)
    return low, max(each.median_s * math.exp(_TAILS * each.deviation) for each in beliefs)


def _integral(value: Callable[[float], float], low: float, high: float) -> float:
    """Over t from low to high, by the middles of steps that are equal in ln t."""
    if not high > low:
        return 0.0
    ratio = math.exp(math.log(high / low) / _POINTS)
    half, width = math.sqrt(ratio), ratio - 1.0
    total, edge = 0.0, low
    for _ in range(_POINTS):
        total += value(edge * half) * edge * width
        edge *= ratio
    return total
