"""What running jobs last saw of the groups they gave up: pure bookkeeping.

A group that was left because a link or a node had become slow may have been quick for hours before, and that is what
its lesson says for all jobs to come. The job that left it must not take it back for that: to this job its last step is
what counts, for a while, and for twice as long whenever it has left the same group again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from protos.ids import JobId
from protos.plan import Learned, Plan

HOLD_S = 600.0


@dataclass(frozen=True, slots=True)
class _Left:
    plan: Plan
    step_s: float
    until_s: float
    times: int


@dataclass(slots=True)
class LeftGroups:
    """Combinations of job and placement (strategies/learned.py), by job. Not durable: after a restart lessons hold."""

    clock: Callable[[], float] = time.monotonic
    _jobs: dict[JobId, dict[str, _Left]] = field(default_factory=dict)

    def note(self, job_id: JobId, plan: Plan, step_s: float) -> None:
        """The job leaves the group of `plan`, whose steps took `step_s` lately."""
        if plan.estimate.basis is None:
            return
        key, known = plan.estimate.basis.combination, self._jobs.setdefault(job_id, {})
        times = known[key].times + 1 if key in known else 1
        known[key] = _Left(plan, step_s, self.clock() + HOLD_S * 2 ** (times - 1), times)

    def over(self, learned: Learned, job_id: JobId) -> Learned:
        """What was learned, as this job sees it."""
        left, now_s = self._jobs.get(job_id, {}), self.clock()
        steps = {key: each.step_s for key, each in left.items() if now_s < each.until_s}
        return replace(learned, steps={**learned.steps, **steps}) if steps else learned

    def plans(self, job_id: JobId) -> tuple[Plan, ...]:
        """Of the groups that this job left, of each combination the last."""
        return tuple(each.plan for each in self._jobs.get(job_id, {}).values())

    def forget(self, job_id: JobId) -> None:
        self._jobs.pop(job_id, None)
