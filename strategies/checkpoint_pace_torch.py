"""At which steps the ranks of a group write the parts of a checkpoint: clocks differ, so they agree on a step.

Every rank proposes how many of its steps fill the interval; the largest proposal is the next distance for all. They
talk only at steps that all know beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from strategies.group_torch import Group

FIRST_STEPS = 5  # enough to know how long a step takes


class CheckpointPace:
    def __init__(
        self, group: Group, first_step: int, every_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._group = group
        self._every_s = every_s
        self._clock = clock
        self._since_s, self._since_step = clock(), first_step
        self._talk_at = first_step + FIRST_STEPS
        self._due_at: int | None = None

    def due(self, step: int) -> bool:
        """After each committed step, on every rank: whether a checkpoint of it is written. Raises PeerLost."""
        now = step == self._due_at
        if step == self._talk_at or now:
            self._agree(step)
        return now

    def _agree(self, step: int) -> None:
        step_s = max(self._clock() - self._since_s, 1e-9) / max(step - self._since_step, 1)
        elapsed_s = 0.0 if step == self._due_at else self._clock() - self._since_s
        steps = torch.tensor([max(1, round((self._every_s - elapsed_s) / step_s))], dtype=torch.int64)
        steps = steps.to(self._group.device)
        self._group.all_reduce(steps, dist.ReduceOp.MAX)
        self._since_s, self._since_step = self._clock(), step
        self._due_at = step + int(steps.item())
