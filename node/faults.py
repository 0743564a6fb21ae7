"""What a node reports when a task ended before its worker could say anything, and why it takes no work at all. Pure."""

from __future__ import annotations

from protos.errors import Blame, ErrorCode, HiveError
from protos.states import AttemptState, Reason
from protos.work import Fault, Outcome


class CannotWork(HiveError):
    """No worker starts on this machine, whatever the task: torch is missing or broken, or the system refuses."""

    @classmethod
    def of(cls, error: HiveError) -> CannotWork:
        return cls(error.message, error.hint, code=error.code, blame=error.blame or Blame.NODE)


_REASONS = {
    ErrorCode.DATA_UNUSABLE: (Reason.DATA_UNUSABLE, Blame.USER_CODE, False),
    ErrorCode.EXHAUSTED: (Reason.DISK_FULL, Blame.NODE, True),
    ErrorCode.NOT_FOUND: (Reason.DATA_UNUSABLE, Blame.COORDINATOR, False),
    ErrorCode.UNREACHABLE: (Reason.NODE_LOST, Blame.NETWORK, True),
    ErrorCode.TIMEOUT: (Reason.NODE_LOST, Blame.NETWORK, True),
}


def failed_outcome(error: HiveError) -> Outcome:
    reason, blame, retryable = _REASONS.get(error.code, (Reason.INTERNAL, Blame.NODE, True))
    blame = error.blame or blame
    if reason is Reason.DATA_UNUSABLE and blame is Blame.NODE:  # another machine may see the data
        retryable = True
    fault = Fault(reason, blame, error.message, error.hint, retryable=retryable)
    return Outcome(AttemptState.FAILED, fault=fault)


def stopped_outcome() -> Outcome:
    """A stop came before the task began, or while its result was on its way."""
    fault = Fault(Reason.NODE_LEFT, Blame.POLICY, "stopped on request", retryable=True)
    return Outcome(AttemptState.FAILED, fault=fault)
