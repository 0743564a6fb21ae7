"""At which steps the ranks of a group write the parts of a checkpoint: clocks differ, so they agree on a step.

Every rank proposes how many of its steps fill the interval; the largest proposal is the next distance for all. They
talk only at steps that all know beforehand. They also say whether their last part is still being written or uploaded:
while one rank's is, the parts of a step stay on the nodes' disks, and the next set is uploaded by all or by none.
Otherwise the coordinator would have of every step only the parts of the ranks that were quick.
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
        self,
        group: Group,
        first_step: int,
        every_s: float,
        busy: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group = group
        self._every_s = every_s
        self._busy = busy
        self._clock = clock
        self._since_s, self._since_step = clock(), first_step
        self._talk_at = first_step + FIRST_STEPS
        self._due_at: int | None = None
        self._uploaded_step: int | None = None

    def due(self, step: int) -> bool:
        """After each committed step, on every rank: whether a checkpoint of it is written. Raises PeerLost."""
        if not self.talks(step):
            return False
        said = torch.tensor(self.proposal(step), dtype=torch.int64).to(self._group.device)
        self._group.all_reduce(said, dist.ReduceOp.MAX)
        distance, busy = said.tolist()
        return self.agreed(step, distance, busy)

    def uploads(self, step: int) -> bool:
        """Whether the checkpoint of a step that was due is uploaded: no rank's last one was under way then."""
        return step == self._uploaded_step

    def talks(self, step: int) -> bool:
        """Whether all ranks say something after this step."""
        return step in (self._talk_at, self._due_at)

    def proposal(self, step: int) -> tuple[int, int]:
        """What this rank says at a step where all talk: the steps until the next checkpoint; 1 while it is busy."""
        step_s = max(self._clock() - self._since_s, 1e-9) / max(step - self._since_step, 1)
        elapsed_s = 0.0 if step == self._due_at else self._clock() - self._since_s
        return max(1, round((self._every_s - elapsed_s) / step_s)), int(self._busy())

    def agreed(self, step: int, distance: int, busy: int) -> bool:
        """The largest of what the ranks said: whether a checkpoint of this step is written."""
        due = step == self._due_at
        if due and not busy:
            self._uploaded_step = step
        self._since_s, self._since_step = self._clock(), step
        self._due_at = step + distance
        return due
