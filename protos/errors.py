"""The one error tree, and the one table from an error code to what each surface shows.

HiveError
 ├─ SpecError            the job file, the model or the data as the user wrote them      exit 3
 ├─ NotFound             a job, node, artifact or file that is not there                 exit 4
 ├─ AccessError          token, certificate or role                                      exit 5
 ├─ Unreachable          the coordinator cannot be talked to (down, wrong version)       exit 6
 ├─ NoPlacement          no plan fits the cluster; the reasons say why                   exit 7
 ├─ DeadlineExceeded     something outside did not answer in time                        exit 8
 ├─ Conflict             the thing is in a state that does not allow it                  exit 2
 ├─ Exhausted            disk, memory or a limit                                         exit 1
 └─ JobFailed            the job itself ended badly (user code, NaN, nodes)              exit 100

Every error says what happened (message), and what to do next (hint). `blame` says whose fault it is; `details` are
lines that back it up, such as the user's own traceback.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Blame(StrEnum):
    USER_CODE = "user_code"
    NODE = "node"
    NETWORK = "network"
    POLICY = "policy"
    COORDINATOR = "coordinator"


class ErrorCode(StrEnum):
    UNEXPECTED = "unexpected"
    USAGE = "usage"
    INVALID_SPEC = "invalid_spec"
    UNSUPPORTED = "unsupported"
    MODEL_UNUSABLE = "model_unusable"
    DATA_UNUSABLE = "data_unusable"
    NOT_FOUND = "not_found"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    UNREACHABLE = "unreachable"
    VERSION_MISMATCH = "version_mismatch"
    NO_PLACEMENT = "no_placement"
    TIMEOUT = "timeout"
    CONFLICT = "conflict"
    STALE_FENCE = "stale_fence"
    EXHAUSTED = "exhausted"
    CORRUPT = "corrupt"
    PORT_TAKEN = "port_taken"
    JOB_FAILED = "job_failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Surface:
    """How one error code looks from outside: gRPC status name, HTTP status, CLI exit code, worth a retry."""

    grpc: str
    http: int
    exit_code: int
    retryable: bool


TABLE: dict[ErrorCode, Surface] = {
    ErrorCode.UNEXPECTED: Surface("INTERNAL", 500, 1, False),
    ErrorCode.USAGE: Surface("INVALID_ARGUMENT", 400, 2, False),
    ErrorCode.INVALID_SPEC: Surface("INVALID_ARGUMENT", 422, 3, False),
    ErrorCode.UNSUPPORTED: Surface("UNIMPLEMENTED", 422, 3, False),
    ErrorCode.MODEL_UNUSABLE: Surface("INVALID_ARGUMENT", 422, 3, False),
    ErrorCode.DATA_UNUSABLE: Surface("INVALID_ARGUMENT", 422, 3, False),
    ErrorCode.NOT_FOUND: Surface("NOT_FOUND", 404, 4, False),
    ErrorCode.UNAUTHENTICATED: Surface("UNAUTHENTICATED", 401, 5, False),
    ErrorCode.FORBIDDEN: Surface("PERMISSION_DENIED", 403, 5, False),
    ErrorCode.UNREACHABLE: Surface("UNAVAILABLE", 503, 6, True),
    ErrorCode.VERSION_MISMATCH: Surface("FAILED_PRECONDITION", 426, 6, False),
    ErrorCode.NO_PLACEMENT: Surface("FAILED_PRECONDITION", 409, 7, False),
    ErrorCode.TIMEOUT: Surface("DEADLINE_EXCEEDED", 504, 8, True),
    ErrorCode.CONFLICT: Surface("FAILED_PRECONDITION", 409, 2, False),
    ErrorCode.STALE_FENCE: Surface("ABORTED", 409, 1, False),
    ErrorCode.EXHAUSTED: Surface("RESOURCE_EXHAUSTED", 507, 1, True),
    ErrorCode.CORRUPT: Surface("DATA_LOSS", 422, 1, True),
    ErrorCode.PORT_TAKEN: Surface("ALREADY_EXISTS", 409, 1, False),
    ErrorCode.JOB_FAILED: Surface("ABORTED", 409, 100, False),
    ErrorCode.CANCELLED: Surface("CANCELLED", 409, 103, False),
}

EXIT_DETACHED = 130


class HiveError(Exception):
    """What happened, whose fault, what to do next. `code` decides gRPC status, HTTP status and exit code by `TABLE`."""

    default_code = ErrorCode.UNEXPECTED

    def __init__(
        self,
        message: str,
        hint: str = "",
        *,
        code: ErrorCode | None = None,
        blame: Blame | None = None,
        details: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code
        self.blame = blame
        self.details = details

    @property
    def exit_code(self) -> int:
        return TABLE[self.code].exit_code

    def document(self) -> dict[str, str]:
        said = {"code": self.code.value, "message": self.message, "hint": self.hint}
        return {**said, "details": "\n".join(self.details)} if self.details else said


class SpecError(HiveError):
    default_code = ErrorCode.INVALID_SPEC


class NotFound(HiveError):
    default_code = ErrorCode.NOT_FOUND


class AccessError(HiveError):
    default_code = ErrorCode.UNAUTHENTICATED


class Unreachable(HiveError):
    default_code = ErrorCode.UNREACHABLE


class NoPlacement(HiveError):
    default_code = ErrorCode.NO_PLACEMENT


class DeadlineExceeded(HiveError):
    default_code = ErrorCode.TIMEOUT


class Conflict(HiveError):
    default_code = ErrorCode.CONFLICT


class Exhausted(HiveError):
    default_code = ErrorCode.EXHAUSTED


class JobFailed(HiveError):
    default_code = ErrorCode.JOB_FAILED


_CLASSES: dict[ErrorCode, type[HiveError]] = {
    ErrorCode.INVALID_SPEC: SpecError,
    ErrorCode.UNSUPPORTED: SpecError,
    ErrorCode.MODEL_UNUSABLE: SpecError,
    ErrorCode.DATA_UNUSABLE: SpecError,
    ErrorCode.NOT_FOUND: NotFound,
    ErrorCode.UNAUTHENTICATED: AccessError,
    ErrorCode.FORBIDDEN: AccessError,
    ErrorCode.UNREACHABLE: Unreachable,
    ErrorCode.VERSION_MISMATCH: Unreachable,
    ErrorCode.NO_PLACEMENT: NoPlacement,
    ErrorCode.TIMEOUT: DeadlineExceeded,
    ErrorCode.CONFLICT: Conflict,
    ErrorCode.STALE_FENCE: Conflict,
    ErrorCode.EXHAUSTED: Exhausted,
    ErrorCode.JOB_FAILED: JobFailed,
}


def from_document(document: dict[str, str]) -> HiveError:
    """The error another machine sent, as the same class here; an unknown code becomes UNEXPECTED."""
    try:
        code = ErrorCode(document.get("code", ""))
    except ValueError:
        code = ErrorCode.UNEXPECTED
    details = tuple(document.get("details", "").splitlines())
    message = document.get("message", "unknown error")
    return _CLASSES.get(code, HiveError)(message, document.get("hint", ""), code=code, details=details)
