"""What this node should do next: leases in, workers to start and stop and reports to send out. Pure.

Invariants: at most one worker of a job at a time (the next group starts when the last worker has ended: they share a
checkpoint folder); a job's fence never goes back; every lease ends in exactly one DONE or FAILED report.
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
    works: Mapping[tuple[JobId, Fence], Work] = field(default_factory=lambda: MappingProxyType({}))
    fences: Mapping[JobId, Fence] = field(default_factory=lambda: MappingProxyType({}))
    paused: str = ""  # why the owner paused this node, empty when not
    draining: str = ""

    @property
    def activity(self) -> tuple[Activity, str]:
        if self.paused or self.draining:
            return Activity.PAUSED, self.paused or self.draining
        busy = [work.task.job_id for work in self.works.values() if work.phase is not Phase.ENDED]
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
    job_id: JobId
    fence: Fence
    mode: StopMode
    why: str


@dataclass(frozen=True, slots=True)
class WorkerReady:
    job_id: JobId
    fence: Fence


@dataclass(frozen=True, slots=True)
class WorkerProgressed:
    job_id: JobId
    fence: Fence
    step: int


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """The process is gone; the outcome says how, also when it crashed."""

    job_id: JobId
    fence: Fence
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The coordinator has made the last report of this lease durable."""

    job_id: JobId
    fence: Fence


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
            work = state.works.get((event.job_id, event.fence))
            if work is None or work.phase is not Phase.WORKING or work.state is not AttemptState.ACCEPTED:
                return Decision(state, (), "not working")
            state = _with(state, replace(work, state=AttemptState.READY))
            return Decision(state, (_report(work.task, AttemptState.READY),), "ready")
        case WorkerProgressed():
            work = state.works.get((event.job_id, event.fence))
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
            work = state.works.get((event.job_id, event.fence))
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
    works = MappingProxyType({**state.works, (work.task.job_id, work.task.fence): work})
    fence = max(work.task.fence, state.fences.get(work.task.job_id, Fence(0)))
    return replace(state, works=works, fences=MappingProxyType({**state.fences, work.task.job_id: fence}))


def _refuse(state: State, task: Task, reason: Reason, message: str) -> Decision:
    fault = Fault(reason, Blame.POLICY, message, retryable=True)
    work = Work(task, Phase.ENDED, AttemptState.FAILED)
    report = _report(task, AttemptState.FAILED, Outcome(AttemptState.FAILED, fault=fault))
    return Decision(_with(state, work), (report,), message)


def _offered(state: State, task: Task) -> Decision:
    known = state.works.get((task.job_id, task.fence))
    if known is not None:
        return Decision(state, (), "offered before")
    if task.fence <= state.fences.get(task.job_id, Fence(0)):
        return _refuse(state, task, Reason.PEER_LOST, f"fence {task.fence} was stopped or replaced before it came")
    if state.paused or state.draining:
        return _refuse(state, task, Reason.NODE_LEFT, state.paused or state.draining)
    others = [work for work in state.works.values() if work.phase is not Phase.ENDED]
    if any(work.task.job_id != task.job_id for work in others):
        return _refuse(state, task, Reason.NODE_LEFT, f"busy with {others[0].task.job_id}")
    accepted = _report(task, AttemptState.ACCEPTED)
    if not others:
        state = _with(state, Work(task, Phase.WORKING, AttemptState.ACCEPTED))
        return Decision(state, (accepted, Start(task)), "accepted")
    effects: list[Effect] = [accepted]
    for work in others:
        if work.phase is Phase.WAITING:
            state, failed = _superseded(state, work)
            effects.append(failed)
        else:
            effects.append(StopWorker(task.job_id, work.task.fence, StopMode.HOLD, "a new group is forming"))
            state = _with(state, replace(work, stopping=StopMode.HOLD))
    state = _with(state, Work(task, Phase.WAITING, AttemptState.ACCEPTED))
    return Decision(state, tuple(effects), "accepted, waits for the earlier worker to end")


def _superseded(state: State, work: Work) -> tuple[State, Report]:
    fault = Fault(Reason.PEER_LOST, Blame.NETWORK, "a newer group replaced this one", retryable=True)
    report = _report(work.task, AttemptState.FAILED, Outcome(AttemptState.FAILED, fault=fault))
    return _with(state, replace(work, phase=Phase.ENDED, state=AttemptState.FAILED)), report


def _stop(state: State, event: StopAsked) -> Decision:
    work = state.works.get((event.job_id, event.fence))
    if work is None:
        newest = max(event.fence, state.fences.get(event.job_id, Fence(0)))
        fences = MappingProxyType({**state.fences, event.job_id: newest})
        return Decision(replace(state, fences=fences), (), "unknown lease: a late offer of it will be refused")
    if work.phase is Phase.WAITING:
        state, failed = _superseded(state, work)
        return Decision(state, (failed,), "stopped before it began")
    if work.phase is Phase.ENDED or work.stopping is StopMode.CANCEL or work.stopping is event.mode:
        return Decision(state, (), "already stopping")
    state = _with(state, replace(work, stopping=event.mode))
    return Decision(state, (StopWorker(event.job_id, event.fence, event.mode, event.why),), event.why)


def _ended(state: State, event: WorkerEnded) -> Decision:
    work = state.works.get((event.job_id, event.fence))
    if work is None or work.phase is not Phase.WORKING:
        return Decision(state, (), "ended before")
    step_now = max(work.step, event.outcome.step)
    state = _with(state, replace(work, phase=Phase.ENDED, state=event.outcome.state, step=step_now))
    effects: list[Effect] = [_report(work.task, event.outcome.state, event.outcome)]
    for waiting in state.works.values():
        if waiting.phase is Phase.WAITING:
            state = _with(state, replace(waiting, phase=Phase.WORKING))
            effects.append(Start(waiting.task))
            break
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
            state = _with(state, replace(work, stopping=StopMode.PAUSE))
            effects.append(StopWorker(work.task.job_id, work.task.fence, StopMode.PAUSE, event.why))
    return Decision(state, tuple(effects), event.why)
