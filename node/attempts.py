"""The work this node has taken: what the agent decides is carried out here, every change is told.

Owns the agent's state and the attempts under way. Refuses to decide: that is node.agent. Invariant: whatever the agent
reports goes into the spool before anything else happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from node import agent
from node.attempt import Attempt, Listener, Place, Tools
from node.fitness import Fitness
from protos import documents
from protos.gen import membership_pb2 as pb
from protos.ids import JobId
from protos.log import Log
from protos.states import Activity
from protos.work import HeldLease, Outcome, Task

log = Log("hive.node.attempts")

Background = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Attempts:
    """`starts` is called before a worker takes the machine, `changed` when the node's activity is another one."""

    def __init__(
        self,
        name: str,
        tools: Tools,
        fitness: Callable[[], Fitness],
        background: Background,
        starts: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self._name = name
        self._tools = tools
        self._fitness = fitness
        self._background = background
        self._starts = starts
        self._changed = changed
        self._state = agent.State()
        self._under_way: dict[agent.Key, Attempt] = {}
        self.unfit = ""  # why workers do not start here
        self.quiet = asyncio.Event()  # set whenever something has come to its end

    def __bool__(self) -> bool:
        return bool(self._under_way)

    @property
    def jobs(self) -> frozenset[JobId]:
        return frozenset(job_id for job_id, *_ in list(self._under_way))

    def activity(self) -> tuple[Activity, str]:
        activity, reason = self._state.activity
        obstacle = self._fitness().obstacle
        if obstacle and not self.unfit and activity is not Activity.BUSY:
            return Activity.PAUSED, obstacle
        return activity, reason

    def leases(self) -> tuple[HeldLease, ...]:
        return self._state.leases()

    def apply(self, event: agent.Event) -> None:
        before = self.activity()
        decision = agent.step(self._state, event)
        self._state = decision.state
        for effect in decision.effects:
            match effect:
                case agent.Start(task):
                    self._start(task)
                case agent.StopWorker(job_id, fence, rank, mode, why):
                    attempt = self._under_way.get((job_id, fence, rank))
                    if attempt is not None:
                        log.info("stopping", job=job_id, rank=rank, mode=mode.value, why=why)
                        self._background(attempt.stop(mode))
                case agent.Report(job_id, fence, rank, state, outcome):
                    report = pb.Durable(job_id=job_id, fence=fence, rank=rank)
                    report.report.state = state.value
                    if outcome is not None:
                        report.report.outcome_json = documents.encode(outcome)
                    self._tools.send(report)
        if self.activity() != before:
            self._changed()

    def judge(self, why: str) -> None:
        """Workers do not start here (why), or do again (empty). The owner's own pause stays as it is."""
        before, self.unfit = self.unfit, why
        if why:
            log.error("this machine takes no work", reason=why)
            if self._state.paused in ("", before):
                self.apply(agent.OwnerAsked("pause", why))
        elif before and self._state.paused == before and not self._state.draining:
            self.apply(agent.OwnerAsked("resume", ""))
        self._changed()

    def resume(self) -> None:
        """The owner's word; where workers do not start it is not the owner's word that is missing."""
        self.apply(agent.OwnerAsked("resume", ""))
        if self.unfit:
            self.apply(agent.OwnerAsked("pause", self.unfit))
            self._fitness().try_again()

    def _start(self, task: Task) -> None:
        key = agent.key_of(task)

        def ended(outcome: Outcome) -> None:
            self._under_way.pop(key, None)
            self.apply(agent.WorkerEnded(*key, outcome))
            self.quiet.set()

        listener = Listener(
            ready=lambda: self.apply(agent.WorkerReady(*key)),
            progressed=lambda step: self.apply(agent.WorkerProgressed(*key, step)),
            ended=ended,
            unable=self._fitness().doubt,
        )
        place = Place.of(task, self._name, self._fitness().capacity)
        attempt = self._under_way[key] = Attempt(task, place, self._tools, listener)
        self._starts()
        self._background(attempt.run())
