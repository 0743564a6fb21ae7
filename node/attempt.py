"""One attempt on this node, from its files to its last report: what the worker says, passed on in the right order.

Order matters at the end: results and checkpoints are uploaded before the report that names them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from node.exit_report import ExitReport
from node.runner import Runner
from node.session import Session
from node.store_calls import StoreCalls
from node.transfers import Transfers
from node.worker_handle import StoreAnswer, WorkerHandle
from node.workspace import Workspaces
from protos import documents
from protos.artifact import Artifact
from protos.errors import Blame, ErrorCode, HiveError
from protos.gen import membership_pb2 as pb
from protos.gen import work_pb2
from protos.states import AttemptState, Reason, StopMode
from protos.work import Checkpoint, Fault, Outcome, Progress, Task

log = structlog.get_logger()

_DRAIN_UPLOAD_S = 60.0


class Attempt:
    """`ready`, `progressed` and `ended` tell the daemon; everything else goes to the coordinator from here."""

    def __init__(
        self,
        task: Task,
        node_name: str,
        interface: str,
        threads: int,
        device: str,
        runner: Runner,
        workspaces: Workspaces,
        transfers: Transfers,
        store_calls: StoreCalls,
        session: Session,
        ready: Callable[[], None],
        progressed: Callable[[int], None],
        ended: Callable[[Outcome], None],
    ) -> None:
        self.task = task
        self._node_name = node_name
        self._where = (interface, threads, device)
        self._runner = runner
        self._workspaces = workspaces
        self._transfers = transfers
        self._store_calls = store_calls
        self._session = session
        self._ready = ready
        self._progressed = progressed
        self._ended = ended
        self._handle: WorkerHandle | None = None
        self._exit: asyncio.Future[ExitReport] = asyncio.get_running_loop().create_future()
        self._artifacts: list[tuple[str, Path]] = []
        self._uploading: asyncio.Task[None] | None = None
        self._stop: StopMode | None = None
        self._samples = 0

    async def run(self) -> None:
        """The whole life; `ended` is called exactly once."""
        started_s = time.monotonic()
        try:
            outcome = await self._live()
        except HiveError as error:
            outcome = failed_outcome(error)
        except OSError as error:
            outcome = failed_outcome(HiveError(f"{self._node_name}: {error}", "check the disk: hive-node doctor"))
        except Exception as error:
            log.exception("attempt failed", job=self.task.job_id)
            what = f"{self._node_name} failed: {type(error).__name__}: {error}"
            outcome = failed_outcome(HiveError(what, "see its log"))
        if self._uploading is not None:
            self._uploading.cancel()
        self._workspaces.close_attempt(self.task)
        log.info("attempt ended", job=self.task.job_id, state=outcome.state, seconds=time.monotonic() - started_s)
        self._ended(outcome)

    async def _live(self) -> Outcome:
        workspace = await self._workspaces.prepare(self.task)
        if self._stopping() is not None:
            return failed_outcome(HiveError("stopped before it began", blame=Blame.POLICY))
        interface, threads, device = self._where
        self._handle = await self._runner.start(self.task, workspace, interface, threads, device, self._node_name, self)
        if (mode := self._stopping()) is not None:  # it came while the worker was being started
            await self._handle.stop(mode)
        report = await self._exit
        outcome = report.final_outcome()
        if outcome.usage is not None:
            peak = max(outcome.usage.peak_memory_bytes, report.peak_memory_bytes)
            outcome = replace(outcome, usage=replace(outcome.usage, peak_memory_bytes=peak))
        if outcome.state is AttemptState.DONE:
            delivered = [await self._transfers.put_artifact(name, path) for name, path in self._artifacts]
            return replace(outcome, artifacts=tuple(Artifact(a.name, a.digest, a.bytes) for a in delivered))
        if self._stopping() is StopMode.PAUSE and outcome.held_step is not None and self.task.rank == 0:
            await self._hand_over(outcome)
        return outcome

    async def _hand_over(self, outcome: Outcome) -> None:
        """This node may be gone when the job goes on: leave the newest state with the coordinator, bounded in time."""
        newest = self._workspaces.newest_checkpoint(self.task.job_id)
        if newest is None:
            return
        try:
            async with asyncio.timeout(_DRAIN_UPLOAD_S):
                await self._upload(newest[1], newest[0], outcome.samples)
        except (TimeoutError, HiveError) as error:
            log.warning("checkpoint not handed over", job=self.task.job_id, reason=str(error))

    def _stopping(self) -> StopMode | None:
        return self._stop

    async def stop(self, mode: StopMode) -> None:
        self._stop = mode
        if self._handle is not None:
            await self._handle.stop(mode)

    async def kill(self) -> None:
        if self._handle is not None:
            await self._handle.kill()

    # ---- WorkerHandler

    def on_ready(self) -> None:
        self._ready()

    def on_progress(self, progress: Progress) -> None:
        self._samples = progress.samples
        self._session.send_durable(self._durable(progress_json=documents.encode(progress)))
        self._progressed(progress.step)

    def on_checkpoint(self, folder: Path, step: int, samples: int) -> None:
        if self._uploading is None or self._uploading.done():
            self._uploading = asyncio.create_task(self._upload_quietly(folder, step, samples))

    def on_artifact(self, name: str, path: Path) -> None:
        self._artifacts.append((name, path))

    def on_store_call(
        self, operation: str, keys: Sequence[str], value: bytes, expected: bytes, amount: int, timeout_s: float
    ) -> Awaitable[StoreAnswer]:
        return self._store_calls.call(
            self.task.job_id, self.task.fence, operation, keys, value, expected, amount, timeout_s
        )

    def on_log(self, lines: list[str]) -> None:
        self._session.send_durable(self._durable(logs=work_pb2.LogLines(lines=lines)))

    def on_exit(self, report: ExitReport) -> None:
        if not self._exit.done():
            self._exit.set_result(report)

    # ----

    def _durable(self, **body: object) -> pb.Durable:
        return pb.Durable(job_id=self.task.job_id, fence=self.task.fence, rank=self.task.rank, **body)  # type: ignore[arg-type]

    async def _upload_quietly(self, folder: Path, step: int, samples: int) -> None:
        try:
            await self._upload(folder, step, samples)
        except (HiveError, OSError) as error:  # the next one will do: this one is only insurance
            log.warning("checkpoint not uploaded", job=self.task.job_id, step=step, reason=str(error))

    async def _upload(self, folder: Path, step: int, samples: int) -> None:
        staging = folder.parent.parent / f"uploading-{self.task.fence}"
        manifest = await self._transfers.put_folder(folder, staging)
        checkpoint = Checkpoint(step, samples, manifest)
        self._session.send_durable(self._durable(checkpoint_json=documents.encode(checkpoint)))


_REASONS = {
    ErrorCode.DATA_UNUSABLE: (Reason.DATA_UNUSABLE, Blame.USER_CODE, False),
    ErrorCode.EXHAUSTED: (Reason.DISK_FULL, Blame.NODE, True),
    ErrorCode.NOT_FOUND: (Reason.DATA_UNUSABLE, Blame.COORDINATOR, False),
    ErrorCode.UNREACHABLE: (Reason.NODE_LOST, Blame.NETWORK, True),
    ErrorCode.TIMEOUT: (Reason.NODE_LOST, Blame.NETWORK, True),
}


def failed_outcome(error: HiveError) -> Outcome:
    reason, blame, retryable = _REASONS.get(error.code, (Reason.INTERNAL, Blame.NODE, True))
    fault = Fault(reason, error.blame or blame, error.message, error.hint, retryable=retryable)
    return Outcome(AttemptState.FAILED, fault=fault)
