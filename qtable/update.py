"""The two update rules, as functions of numbers.

`q_learning` is the plain rule. What is stored follows `corrected`: every group's time is scaled to the whole job, so
nothing is left to be bootstrapped from what comes next (docs/qtable.md), and the value moves towards the frozen prior
plus what the prediction was wrong by.
"""

from __future__ import annotations

ALPHA = 0.1
GAMMA = 0.9


def q_learning(q: float, reward: float, best_next: float, alpha: float = ALPHA, gamma: float = GAMMA) -> float:
    """Q <- Q + alpha (r + gamma max Q' - Q) (Watkins, 1989). `best_next` is 0 after a terminal step."""
    return q + alpha * (reward + gamma * best_next - q)


def corrected(q: float, q0: float, reward: float, count: int, alpha: float = ALPHA) -> float:
    """Q <- Q + max(alpha, 1/n) (Q0 + rho - Q), n = `count` including this outcome: first a mean, then a moving one.

    Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count includes the outcome being applied, so it is at least 1: {count}")
    return q + max(alpha, 1.0 / count) * (q0 + reward - q)
