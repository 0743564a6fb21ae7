"""The reward of a finished job: how much faster or slower it was than predicted."""

from __future__ import annotations

import math

LIMIT = 2.0  # e^2: a run more than 7.4 times off says no more than one that is 7.4 times off


def reward(predicted_s: float, measured_s: float) -> float:
    """rho = clip(ln(T_pred / T_meas), -2, 2): negative when the job was slower than predicted.

    Raises ValueError unless both times are positive and finite.
    """
    for seconds in (predicted_s, measured_s):
        if not (seconds > 0 and math.isfinite(seconds)):
            raise ValueError(f"a time must be positive and finite: predicted {predicted_s}, measured {measured_s}")
    return max(-LIMIT, min(LIMIT, math.log(predicted_s) - math.log(measured_s)))
