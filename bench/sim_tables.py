"""Ways of choosing that PLANNER's method replaces, for comparison: pure bookkeeping over true times.

The literal table of the first design: zeros, epsilon-greedy over the feasible actions, the plain update rule. The best
fixed action of each cell: what any such table could reach with infinite data. Both are given more than they would have:
actions that cannot run are masked, and each action is carried out with the best plan inside it.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from qtable.state import ACTIONS, StateKey
from qtable.update import q_learning

EPSILON = 0.1


@dataclass(frozen=True, slots=True)
class Case:
    """A job: its cell, the true time of the best plan of each feasible action, and of the best of all."""

    key: StateKey
    actions: Mapping[str, float]
    oracle_s: float

    def regret(self, action: str) -> float:
        return self.actions[action] / self.oracle_s - 1.0


def literal(cases: Sequence[Case], seed: int) -> list[float]:
    """Regrets in the order of the cases, learning as it goes; the reward is the speed in jobs per hour, in logs."""
    rng, table = random.Random(seed), defaultdict[StateKey, dict[str, float]](lambda: dict.fromkeys(ACTIONS, 0.0))
    regrets = []
    for case in cases:
        row = table[case.key]
        feasible = [action for action in ACTIONS if action in case.actions]
        action = max(feasible, key=lambda name: row[name])
        if rng.random() < EPSILON:
            action = rng.choice(feasible)
        reward = math.log(3600 / case.actions[action])
        row[action] = q_learning(row[action], reward, max(row.values()))
        regrets.append(case.regret(action))
    return regrets


def fixed(cases: Sequence[Case]) -> list[float]:
    """Regrets of the action that is best on average in each cell; where it cannot be, of the next best."""
    seen: dict[StateKey, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        for action in case.actions:
            seen[case.key][action].append(math.log1p(case.regret(action)))
    means = {key: {action: fmean(values) for action, values in row.items()} for key, row in seen.items()}
    return [case.regret(min(case.actions, key=lambda action: means[case.key][action])) for case in cases]
