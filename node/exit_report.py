"""How a worker process ended, in words the owner and the coordinator can use. Pure."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from enum import StrEnum

from protos.errors import Blame
from protos.states import AttemptState, Reason
from protos.work import Fault, Outcome

_SIGNALS = {int(number): number.name for number in signal.Signals}
EXIT_BROKEN = 70  # the worker could not start, or lost its daemon


class ExitKind(StrEnum):
    OK = "ok"  # it returned an outcome, good or bad, and ended by itself
    MEMORY = "memory"  # over the node's cap, or killed by the kernel for want of memory
    TIME = "time"
    POLICY = "policy"  # it did what a task must not do
    CRASH = "crash"  # ended without an outcome, or stopped answering
    KILLED = "killed"  # the node ended it: cancelled, paused, leaving


@dataclass(frozen=True, slots=True)
class ExitReport:
    kind: ExitKind
    message: str
    outcome: Outcome | None
    signal: str | None  # "SIGSEGV"
    exit_code: int | None
    last_lines: tuple[str, ...]
    peak_memory_bytes: int
    cpu_s: float

    def final_outcome(self) -> Outcome:
        """The task's own outcome, or a FAILED one that says how the process ended."""
        return self.outcome or Outcome(AttemptState.FAILED, fault=self._fault())

    def _fault(self) -> Fault:
        match self.kind:
            case ExitKind.MEMORY:
                reason, blame, again = Reason.OUT_OF_MEMORY, Blame.POLICY, False
                hint = "use a smaller batch or model, or grant more with --memory"
            case ExitKind.POLICY:
                reason, blame, hint, again = Reason.USER_CODE, Blame.USER_CODE, "see the last lines of the log", False
            case ExitKind.TIME:
                reason, blame, hint, again = Reason.INTERNAL, Blame.NODE, "it may run longer on a faster node", True
            case ExitKind.KILLED:
                reason, blame, hint, again = Reason.NODE_LEFT, Blame.NODE, "the job goes on elsewhere", True
            case ExitKind.CRASH | ExitKind.OK:
                # A plain exit is the program's own doing and would come again; a signal may be this machine's.
                by_itself = self.exit_code not in (None, EXIT_BROKEN)
                reason = Reason.USER_CODE if by_itself else Reason.NODE_LOST
                blame = Blame.USER_CODE if by_itself else Blame.NODE
                hint, again = "see the last lines of the log", not by_itself
        return Fault(reason, blame, self.message, hint, retryable=again, last_lines=self.last_lines)


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known when a process has ended. `status` is of wait4, None when nobody could see it."""

    status: int | None
    cpu_s: float = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Kill:
    """Why the node itself ended the worker."""

    kind: ExitKind
    message: str


def report(
    ending: Ending, outcome: Outcome | None, kill: Kill | None, last_lines: tuple[str, ...], kernel_killed: bool
) -> ExitReport:
    """`kernel_killed`: the kernel ended some process for want of memory while the worker ran."""
    name: str | None = None
    code: int | None = None
    if ending.status is not None and os.WIFSIGNALED(ending.status):
        number = os.WTERMSIG(ending.status)
        name = _SIGNALS.get(number, f"signal {number}")
    elif ending.status is not None:
        code = os.waitstatus_to_exitcode(ending.status)
    if outcome is not None:
        kind, message = ExitKind.OK, "ended with an outcome"
    elif kill is not None:
        kind, message = kill.kind, kill.message
    elif name == "SIGKILL" and kernel_killed:
        kind, message = ExitKind.MEMORY, "the kernel killed the worker: the machine ran out of memory"
    elif name is not None:
        kind, message = ExitKind.CRASH, f"the worker was ended by {name}"
    elif code is not None:
        kind, message = ExitKind.CRASH, f"the worker ended with exit code {code} before its task was done"
    else:
        kind, message = ExitKind.CRASH, "the worker's parent process was ended"
    return ExitReport(kind, message, outcome, name, code, last_lines, ending.peak_memory_bytes, ending.cpu_s)
