"""What this node should do next: leases in, workers to start and stop and reports to send out. Pure.

Invariants: at most one worker per rank, and all workers of a job are of one fence (the next group starts when the last
worker of the one before has ended: they share a checkpoint folder); a job's fence never goes back, and one that was
stopped, or of which a rank has ended, takes no further rank; every lease ends in exactly one DONE or FAILED report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import assert_never

from protos.errors import Blame
from protos.ids import Fence, JobId
from protos.states import Activity, AttemptState, Reason, StopMode
from protos.work import Fault, HeldLease, Outcome, Task


class Phase(StrEnum):
    WAITING = "waiting"  # for the worker of an earlier group to end
    WORKING = "working"
    ENDED = "ended"  # reported, not yet acknowledged


Key = tuple[JobId, Fence, int]
"""Of a lease: job, fence and rank. A node has a rank per granted GPU, so several of one fence."""


def key_of(task: Task) -> Key:
    return task.job_id, task.fence, task.rank


@dataclass(frozen=True, slots=True)
class Work:
    """One lease. `state` is what was last reported."""

    task: Task
    phase: Phase
    state: AttemptState
    stopping: StopMode | None = None
    step: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """`closed`: the highest fence of a job of which no rank is taken any more, nor of any fence below it."""

    works: Mapping[Key, Work] = field(default_factory=lambda: MappingProxyType({}))
    closed: Mapping[JobId, Fence] = field(default_factory=lambda: MappingProxyType({}))
    paused: str = ""  # why the owner paused this node, empty when not
    draining: str = ""

    @property
    def activity(self) -> tuple[Activity, str]:
        if self.paused or self.draining:
            return Activity.PAUSED, self.paused or self.draining
        busy = dict.fromkeys(work.task.job_id for work in self.works.values() if work.phase is not Phase.ENDED)
        return (Activity.BUSY, f"works on {', '.join(busy)}") if busy else (Activity.IDLE, "")

    def leases(self) -> tuple[HeldLease, ...]:
        """What to present in Hello."""
        return tuple(
            HeldLease(work.task.job_id, work.task.fence, work.task.rank, work.state, work.step)
            for work in self.works.values()
        )


@dataclass(frozen=True, slots=True)
class Offered:
    task: Task


@dataclass(frozen=True, slots=True)
class StopAsked:
    """All ranks of this fence on this node, also those whose offer is still on its way."""

    job_id: JobId
    fence: Fence
    mode: StopMode
    why: str


@dataclass(frozen=True, slots=True)
class WorkerReady:
    job_id: JobId
    fence: Fence
    rank: int


@dataclass(frozen=True, slots=True)
class WorkerProgressed:
    job_id: JobId
    fence: Fence
    rank: int
    step: int


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """The process is gone; the outcome says how, also when it crashed."""

    job_id: JobId
    fence: Fence
    rank: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The coordinator has made the last report of this lease durable."""

    job_id: JobId
    fence: Fence
    rank: int


@dataclass(frozen=True, slots=True)
class OwnerAsked:
    """pause, resume, drain (and leave, which drains first)."""

    action: str
    why: str


Event = Offered | StopAsked | WorkerReady | WorkerProgressed | WorkerEnded | Acknowledged | OwnerAsked


@dataclass(frozen=True, slots=True)
class Start:
    task: Task


@dataclass(frozen=True, slots=True)
class StopWorker:
    job_id: JobId
    fence: Fence
    rank: int
    mode: StopMode
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    job_id: JobId
    fence: Fence
    rank: int
    state: AttemptState
    outcome: Outcome | None = None


Effect = Start | StopWorker | Report


@dataclass(frozen=True, slots=True)
class Decision:
    state: State
    effects: tuple[Effect, ...]
    reason: str


def step(state: State, event: Event) -> Decision:
    match event:
        case Offered():
            return _offered(state, event.task)
        case StopAsked():
            return _stop(state, event)
        case WorkerReady():
            work = state.works.get((event.job_id, event.fence, event.rank))
            if work is None or work.phase is not Phase.WORKING or work.state is not AttemptState.ACCEPTED:
                return Decision(state, (), "not working")
            state = _with(state, replace(work, state=AttemptState.READY))
            return Decision(state, (_report(work.task, AttemptState.READY),), "ready")
        case WorkerProgressed():
            work = state.works.get((event.job_id, event.fence, event.rank))
            if work is None or work.phase is not Phase.WORKING:
                return Decision(state, (), "not working")
            effects: tuple[Effect, ...] = ()
            if work.state is AttemptState.READY:
                effects = (_report(work.task, AttemptState.RUNNING),)
                work = replace(work, state=AttemptState.RUNNING)
            return Decision(_with(state, replace(work, step=event.step)), effects, "progress")
        case WorkerEnded():
            return _ended(state, event)
        case Acknowledged():
            work = state.works.get((event.job_id, event.fence, event.rank))
            if work is None or work.phase is not Phase.ENDED:
                return Decision(state, (), "nothing to forget")
            kept = {key: other for key, other in state.works.items() if other is not work}
            return Decision(replace(state, works=MappingProxyType(kept)), (), "forgotten")
        case OwnerAsked():
            return _owner(state, event)
        case _:
            assert_never(event)


def _report(task: Task, state: AttemptState, outcome: Outcome | None = None) -> Report:
    return Report(task.job_id, task.fence, task.rank, state, outcome)


def _with(state: State, work: Work) -> State:
    return replace(state, works=MappingProxyType({**state.works, key_of(work.task): work}))


def _close(state: State, job_id: JobId, fence: int) -> State:
    highest = max(Fence(fence), state.closed.get(job_id, Fence(0)))
    return replace(state, closed=MappingProxyType({**state.closed, job_id: highest}))


def _end(state: State, work: Work, outcome: Outcome) -> tuple[State, Report]:
    """The last report of a lease. Its group is not whole any more: no further rank of it begins here."""
    step_now = max(work.step, outcome.step)
    state = _with(state, replace(work, phase=Phase.ENDED, state=outcome.state, step=step_now))
    return _close(state, work.task.job_id, work.task.fence), _report(work.task, outcome.state, outcome)


def _stop_worker(state: State, work: Work, mode: StopMode, why: str) -> tuple[State, StopWorker]:
    state = _close(_with(state, replace(work, stopping=mode)), work.task.job_id, work.task.fence)
    return state, StopWorker(*key_of(work.task), mode, why)


def _refuse(state: State, task: Task, reason: Reason, message: str) -> Decision:
    fault = Fault(reason, Blame.POLICY, message, retryable=True)
    work = Work(task, Phase.ENDED, AttemptState.FAILED)
    state, report = _end(state, work, Outcome(AttemptState.FAILED, fault=fault))
    return Decision(state, (report,), message)


def _offered(state: State, task: Task) -> Decision:
    if key_of(task) in state.works:
        return Decision(state, (), "offered before")
    if task.fence <= state.closed.get(task.job_id, Fence(0)):
        return _refuse(state, task, Reason.PEER_LOST, f"fence {task.fence} was stopped or replaced before it came")
    if state.paused or state.draining:
        return _refuse(state, task, Reason.NODE_LEFT, state.paused or state.draining)
    others = [work for work in state.works.values() if work.phase is not Phase.ENDED]
    if any(work.task.job_id != task.job_id for work in others):
        return _refuse(state, task, Reason.NODE_LEFT, f"busy with {others[0].task.job_id}")
    state = _close(state, task.job_id, task.fence - 1)
    accepted = _report(task, AttemptState.ACCEPTED)
    earlier = [work for work in others if work.task.fence < task.fence]
    if not any(work.phase is Phase.WORKING for work in earlier):
        state = _with(state, Work(task, Phase.WORKING, AttemptState.ACCEPTED))
        return Decision(state, (accepted, Start(task)), "accepted")
    effects: list[Effect] = [accepted]
    for work in earlier:
        if work.phase is Phase.WAITING:
            state, failed = _superseded(state, work)
            effects.append(failed)
        elif work.stopping is None:
            state, stop = _stop_worker(state, work, StopMode.HOLD, "a new group is forming")
            effects.append(stop)
    state = _with(state, Work(task, Phase.WAITING, AttemptState.ACCEPTED))
    return Decision(state, tuple(effects), "accepted, waits for the earlier workers to end")


def _superseded(state: State, work: Work) -> tuple[State, Report]:
    fault = Fault(Reason.PEER_LOST, Blame.NETWORK, "a newer group replaced this one", retryable=True)
    return _end(state, work, Outcome(AttemptState.FAILED, fault=fault))


def _stop(state: State, event: StopAsked) -> Decision:
    state = _close(state, event.job_id, event.fence)
    ranks = [work for key, work in state.works.items() if key[:2] == (event.job_id, event.fence)]
    if not ranks:
        return Decision(state, (), "unknown lease: a late offer of it will be refused")
    effects: list[Effect] = []
    for work in ranks:
        if work.phase is Phase.WAITING:
            state, failed = _superseded(state, work)
            effects.append(failed)
        elif work.phase is Phase.WORKING and work.stopping not in (StopMode.CANCEL, event.mode):
            state, stop = _stop_worker(state, work, event.mode, event.why)
            effects.append(stop)
    return Decision(state, tuple(effects), event.why if effects else "already stopping")


def _ended(state: State, event: WorkerEnded) -> Decision:
    work = state.works.get((event.job_id, event.fence, event.rank))
    if work is None or work.phase is not Phase.WORKING:
        return Decision(state, (), "ended before")
    state, report = _end(state, work, event.outcome)
    effects: list[Effect] = [report]
    if not any(other.phase is Phase.WORKING for other in state.works.values()):
        for waiting in [other for other in state.works.values() if other.phase is Phase.WAITING]:
            state = _with(state, replace(waiting, phase=Phase.WORKING))
            effects.append(Start(waiting.task))
    return Decision(state, tuple(effects), f"worker ended: {event.outcome.state}")


def _owner(state: State, event: OwnerAsked) -> Decision:
    match event.action:
        case "resume":
            return Decision(replace(state, paused="", draining=""), (), "takes work again")
        case "pause":
            state = replace(state, paused=event.why)
        case _:
            state = replace(state, draining=event.why)
    effects: list[Effect] = []
    for work in list(state.works.values()):
        if work.phase is Phase.WAITING:
            state, failed = _superseded(state, work)
            effects.append(failed)
        elif work.phase is Phase.WORKING and work.stopping is None:
            state, stop = _stop_worker(state, work, StopMode.PAUSE, event.why)
            effects.append(stop)
    return Decision(state, tuple(effects), event.why)
