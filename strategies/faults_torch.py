"""From whatever ended a task to the Fault that is reported: one sentence, whose fault, what to do, retry or not.

Owns the exceptions with which the engine ends itself and the trimming of a user's traceback to their own files. A fault
is retryable only when another attempt of the same job could end differently.
"""

from __future__ import annotations

import errno
import linecache
import traceback
from pathlib import Path

import torch

from protos.errors import Blame, DeadlineExceeded, ErrorCode, Exhausted, HiveError, SpecError
from protos.states import Reason, StopMode
from protos.work import Fault

_MEMORY_MARKS = ("out of memory", "can't allocate memory", "not enough memory")


class PeerLost(Exception):
    """A collective failed: the group is gone, the last committed step is not."""


class Stopped(Exception):
    """The node asked this attempt to end."""

    def __init__(self, mode: StopMode) -> None:
        super().__init__(mode.value)
        self.mode = mode


class NotANumber(Exception):
    """The loss is infinite or not a number."""

    def __init__(self, step: int, learning_rate: float, loss: float) -> None:
        super().__init__(f"the loss became {loss} at step {step} (learning rate {learning_rate:g})")
        self.step = step
        self.learning_rate = learning_rate


class UserCodeError(Exception):
    """The user's model, loss or data function raised; `__cause__` is what it raised."""


class DataUnusable(Exception):
    """The data as the user described them cannot be read; `__cause__` is the SpecError that says why."""


def fault_of(error: BaseException, code_dir: Path | None) -> Fault:
    """Total: every exception has a fault."""
    if isinstance(error, (UserCodeError, DataUnusable)) and error.__cause__ is not None:
        return _fault_of_wrapped(error, error.__cause__, code_dir)
    return _known(error) or _user_code(error, code_dir) or _hive_error(error) or _internal(error)


def _fault_of_wrapped(error: BaseException, cause: BaseException, code_dir: Path | None) -> Fault:
    known = _known(cause)
    if known:
        return known
    if isinstance(error, DataUnusable) and isinstance(cause, HiveError):
        return _unusable(Reason.DATA_UNUSABLE, cause)
    return _user_code(cause, code_dir) or _hive_error(cause) or _raised_by_torch(error, cause)


def _known(error: BaseException) -> Fault | None:
    match error:
        case PeerLost():
            return Fault(
                Reason.PEER_LOST,
                Blame.NETWORK,
                "the connection to another node of the group broke",
                "the group re-forms without the lost node",
                retryable=True,
                last_lines=tuple(str(error).splitlines()[:3]),
            )
        case Stopped(mode=StopMode.PAUSE):
            return Fault(Reason.PAUSED_BY_USER, Blame.POLICY, "paused on request", "hive resume", retryable=True)
        case Stopped(mode=StopMode.CANCEL):
            return Fault(Reason.CANCELLED_BY_USER, Blame.POLICY, "cancelled on request")
        case Stopped():
            return Fault(
                Reason.PEER_LOST, Blame.NETWORK, "held on request: the group changes", "it re-forms", retryable=True
            )
        case NotANumber():
            return Fault(
                Reason.NOT_A_NUMBER,
                Blame.USER_CODE,
                str(error),
                "lower optimizer.lr, set train.clip_norm, or add warm-up steps to the schedule",
            )
        case _ if is_memory(error):
            return Fault(
                Reason.OUT_OF_MEMORY,
                Blame.NODE,
                f"out of memory: {_first_line(error)}",
                "raise train.accumulate, lower train.batch_size, or use a node with more memory",
                retryable=True,
            )
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Fault(
                Reason.DISK_FULL,
                Blame.NODE,
                f"no space left on the disk: {error.filename or _first_line(error)}",
                "free space below HIVE_HOME on that node; the last checkpoint is intact",
                retryable=True,
            )
    return None


def _hive_error(error: BaseException) -> Fault | None:
    match error:
        case SpecError(code=ErrorCode.DATA_UNUSABLE):
            return _unusable(Reason.DATA_UNUSABLE, error)
        case SpecError(code=ErrorCode.MODEL_UNUSABLE):
            return _unusable(Reason.MODEL_UNUSABLE, error)
        case SpecError(code=ErrorCode.UNSUPPORTED):
            return Fault(Reason.MODEL_UNUSABLE, error.blame or Blame.USER_CODE, error.message, error.hint)
        case SpecError():
            return Fault(Reason.USER_CODE, error.blame or Blame.USER_CODE, error.message, error.hint)
        case DeadlineExceeded():
            return Fault(Reason.PEER_LOST, Blame.NETWORK, error.message, error.hint, retryable=True)
        case Exhausted():
            return Fault(Reason.DISK_FULL, error.blame or Blame.NODE, error.message, error.hint, retryable=True)
        case HiveError():
            return Fault(Reason.INTERNAL, error.blame or Blame.NODE, error.message, error.hint)
    return None


def _unusable(reason: Reason, error: HiveError) -> Fault:
    """Retryable when it is the node's: another one may have the package, or the same data."""
    blame = error.blame or Blame.USER_CODE
    return Fault(reason, blame, error.message, error.hint, retryable=blame is Blame.NODE)


def _user_code(error: BaseException, code_dir: Path | None) -> Fault | None:
    """A fault when a frame of the user's code is in the traceback, or their file does not even compile."""
    if code_dir is None or isinstance(error, HiveError):
        return None
    frames = user_frames(error, code_dir)
    where = ""
    if isinstance(error, SyntaxError) and error.filename and _inside(error.filename, code_dir):
        where = f" ({_relative(error.filename, code_dir)} line {error.lineno})"
    elif frames:
        last = frames[-1]
        where = f" ({_relative(last.filename, code_dir)} line {last.lineno} in {last.name})"
    else:
        return None
    lines = trimmed_traceback(error, code_dir)
    message = f"{type(error).__name__}: {_first_line(error)}{where}"
    return Fault(Reason.USER_CODE, Blame.USER_CODE, message, "fix the code and submit again", last_lines=lines)


def user_frames(error: BaseException, code_dir: Path) -> list[traceback.FrameSummary]:
    return [frame for frame in traceback.extract_tb(error.__traceback__) if _inside(frame.filename, code_dir)]


def trimmed_traceback(error: BaseException, code_dir: Path) -> tuple[str, ...]:
    """As Python prints it, with the user's own frames only and paths relative to the job's code."""
    lines = ["Traceback (most recent call last):"]
    for frame in user_frames(error, code_dir):
        lines.append(f'  File "{_relative(frame.filename, code_dir)}", line {frame.lineno}, in {frame.name}')
        source = linecache.getline(frame.filename, frame.lineno or 0).strip()
        if source:
            lines.append(f"    {source}")
    for text in traceback.format_exception_only(error):
        lines += text.replace(f"{code_dir.resolve()}/", "").replace(f"{code_dir}/", "").rstrip().splitlines()
    return tuple(lines)


def _raised_by_torch(error: BaseException, cause: BaseException) -> Fault:
    """The user's module failed inside torch, without a frame of their own (an nn.Sequential, a loss)."""
    what = f"{error}: " if str(error) else ""
    message = f"{what}{type(cause).__name__}: {_first_line(cause)}"
    return Fault(Reason.USER_CODE, Blame.USER_CODE, message, "do the model, the loss and the data fit together?")


def _internal(error: BaseException) -> Fault:
    text = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return Fault(
        Reason.INTERNAL,
        Blame.NODE,
        f"{type(error).__name__}: {_first_line(error)}",
        "this is a mistake in hive: report it with the lines above",
        last_lines=tuple(text[-20:]),
    )


def is_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in _MEMORY_MARKS)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:500] if text else type(error).__name__


def _inside(filename: str, code_dir: Path) -> bool:
    path = Path(filename)
    return path.is_absolute() and path.resolve().is_relative_to(code_dir.resolve())


def _relative(filename: str, code_dir: Path) -> str:
    return str(Path(filename).resolve().relative_to(code_dir.resolve()))
