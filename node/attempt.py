"""One attempt on this node, from its files to its last report: what the worker says, passed on in the right order.

Invariants: results and checkpoints are uploaded before the report that names them; a stop is heard in every phase, so a
download of hours does not hold up a drain and a cancelled job sends nothing more; whatever happens the files are put
away, and `ended` is called once unless the attempt itself is cancelled (the daemon ends, its worker too).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from node.exit_report import ExitReport
from node.faults import CannotWork, failed_outcome, stopped_outcome
from node.networks import LOOPBACK
from node.runner import Runner
from node.store_calls import StoreCalls
from node.transfers import Transfers
from node.worker_handle import StoreAnswer, WorkerHandle
from node.workspace import Workspaces
from protos import documents
from protos.artifact import Artifact
from protos.capacity import Capacity, DeviceInfo
from protos.errors import Conflict, HiveError, SpecError
from protos.gen import membership_pb2 as pb
from protos.gen import work_pb2
from protos.log import Log
from protos.partial_file import disk_error
from protos.states import AttemptState, StopMode
from protos.work import Checkpoint, Outcome, Progress, Task
from strategies.checkpoint_name import CheckpointName, parse_folder

log = Log("hive.node.attempt")
T = TypeVar("T")

# Code that hangs does not hear a stop. A held state takes time to write, a cancelled job has nothing to save.
_GRACE_S = {StopMode.CANCEL: 2.0, StopMode.HOLD: 15.0, StopMode.PAUSE: 15.0}
_COLLECTIVE_MARGIN_S = 5.0
_LONGEST_GRACE_S = 65.0
_DRAIN_UPLOAD_S = 60.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where on this machine a task runs. `interface`: the address its group binds to. `gpus`: the granted ones."""

    node_name: str
    interface: str
    cores: float
    gpus: tuple[DeviceInfo, ...]
    memory_bytes: int
    max_upload_bytes_per_s: float | None = None

    @classmethod
    def of(cls, task: Task, node_name: str, capacity: Capacity) -> Place:
        # By address: an interface may have several, and its owner named one. Empty (not trusted here) binds nowhere.
        address = next((n.address for n in capacity.networks if n.cidr == task.network), "")
        memory, upload = capacity.memory_bytes, capacity.max_upload_bytes_per_s
        return cls(node_name, address, capacity.cores, capacity.gpus, memory, upload)

    def threads(self, task: Task) -> int:
        """The cores are shared by the job's ranks on this node."""
        return max(1, round(self.cores / max(1, task.ranks_here)))

    def upload_bytes_per_s(self, task: Task) -> float | None:
        """What this rank may send to the others, None without a cap: the ranks here share it. Loopback is no upload."""
        if self.max_upload_bytes_per_s is None or task.network == LOOPBACK.cidr:
            return None
        return self.max_upload_bytes_per_s / max(1, task.ranks_here)

    def device(self, task: Task) -> str:
        """The granted GPU of this rank. Raises Conflict when it was there when the job was planned and is not now."""
        if not self.gpus:
            return "cpu"
        if task.device >= len(self.gpus):
            what = f"{self.node_name} has {len(self.gpus)} GPUs now, too few for the plan's number {task.device}"
            raise Conflict(what, "the job is planned again with what is there")
        return f"cuda:{self.gpus[task.device].index}"


@dataclass(frozen=True, slots=True)
class Tools:
    """What every attempt on this node uses. `send` puts a message into the spool."""

    runner: Runner
    workspaces: Workspaces
    transfers: Transfers
    store_calls: StoreCalls
    send: Callable[[pb.Durable], None]


@dataclass(frozen=True, slots=True)
class Listener:
    """What the daemon wants to know. `unable`: no worker starts here, whatever the task."""

    ready: Callable[[], None]
    progressed: Callable[[int], None]
    ended: Callable[[Outcome], None]
    unable: Callable[[CannotWork], None]


class _Stopped(Exception):
    """A stop broke off what this attempt was waiting for."""


class Attempt:
    def __init__(self, task: Task, place: Place, tools: Tools, listener: Listener) -> None:
        self.task = task
        self._place = place
        self._tools = tools
        self._listener = listener
        self._handle: WorkerHandle | None = None
        self._exit: asyncio.Future[ExitReport] = asyncio.get_running_loop().create_future()
        self._artifacts: list[tuple[str, Path]] = []
        self._uploading: asyncio.Task[None] | None = None
        self._stop: StopMode | None = None
        self._phase: asyncio.Task[Any] | None = None
        self._breaks: tuple[StopMode, ...] = ()

    async def run(self) -> None:
        """The whole life."""
        started_s = time.monotonic()
        job_id = self.task.job_id
        try:
            outcome = await self._live()
        except _Stopped:
            outcome = stopped_outcome()
        except HiveError as error:
            outcome = failed_outcome(error)
        except OSError as error:
            outcome = failed_outcome(disk_error(error, Path(str(error.filename or job_id))))
        except asyncio.CancelledError:
            if self._handle is not None:
                await self._handle.kill()
            raise
        except Exception as error:
            log.exception("attempt failed", job=job_id)
            what = f"{self._place.node_name} failed: {type(error).__name__}: {error}"
            outcome = failed_outcome(HiveError(what, "see its log"))
        finally:
            await self._end_upload()
            with contextlib.suppress(SpecError):  # there is nothing to close of a job whose id is none
                self._tools.workspaces.close_attempt(self.task)
        log.info("attempt ended", job=job_id, state=outcome.state, seconds=time.monotonic() - started_s)
        self._listener.ended(outcome)

    async def _live(self) -> Outcome:
        place, device = self._place, self._place.device(self.task)
        workspace = await self._unless(self._tools.workspaces.prepare(self.task), *StopMode)
        try:
            self._handle = await self._tools.runner.start(
                self.task,
                workspace,
                place.interface,
                place.threads(self.task),
                device,
                place.node_name,
                self,
                place.memory_bytes // max(1, self.task.ranks_here),
                place.upload_bytes_per_s(self.task),
            )
        except HiveError as error:
            self._listener.unable(CannotWork.of(error))
            raise
        if (mode := self._stop_mode()) is not None:  # it came while the worker was being started
            await self._handle.stop(mode, self._grace_s(mode))
        report = await self._exit
        outcome = report.final_outcome()
        if outcome.usage is not None:
            peak = max(outcome.usage.peak_memory_bytes, report.peak_memory_bytes)
            outcome = replace(outcome, usage=replace(outcome.usage, peak_memory_bytes=peak))
        if outcome.state is AttemptState.DONE:
            return replace(outcome, artifacts=await self._unless(self._deliver(), StopMode.CANCEL))
        if self._stop_mode() is StopMode.PAUSE:
            await self._hand_over(outcome)
        return outcome

    async def _unless(self, work: Coroutine[Any, Any, T], *modes: StopMode) -> T:
        """Wait for something that a stop of one of these modes breaks off."""
        if self._stop in modes:
            work.close()
            raise _Stopped
        task: asyncio.Task[T] = asyncio.create_task(work)
        self._phase = task
        self._breaks = modes
        try:
            await asyncio.wait({task})
        finally:
            self._phase = None
            task.cancel()
        if task.cancelled():
            raise _Stopped
        return task.result()

    async def _deliver(self) -> tuple[Artifact, ...]:
        return tuple([await self._tools.transfers.put_artifact(name, path) for name, path in self._artifacts])

    async def _hand_over(self, outcome: Outcome) -> None:
        """This node may be gone when the job goes on: leave the newest state with the coordinator, bounded in time."""
        newest = self._tools.workspaces.newest_checkpoint(self.task)
        if newest is None or (newest[0].whole and (self.task.rank or outcome.held_step is None)):
            return
        await self._end_upload()
        try:
            async with asyncio.timeout(_DRAIN_UPLOAD_S):
                await self._unless(self._upload(newest[1], newest[0].step, outcome.samples), StopMode.CANCEL)
        except (TimeoutError, HiveError, OSError, _Stopped) as error:
            log.warning("checkpoint not handed over", job=self.task.job_id, reason=str(error) or type(error).__name__)

    def _stop_mode(self) -> StopMode | None:
        return self._stop

    async def stop(self, mode: StopMode) -> None:
        if mode is StopMode.HOLD and self._stop is not None:
            return  # whoever pauses or cancels holds too; what was to be handed over still is
        self._stop = mode
        if self._phase is not None and mode in self._breaks:
            self._phase.cancel()
        if self._handle is not None:
            await self._handle.stop(mode, self._grace_s(mode))

    def _grace_s(self, mode: StopMode) -> float:
        """A collective that does not break ends at its own deadline: what is to be handed over is worth that wait."""
        grace_s = _GRACE_S[mode]
        if mode is StopMode.PAUSE and self.task.world_size > 1:
            return min(max(grace_s, self.task.collective_timeout_s + _COLLECTIVE_MARGIN_S), _LONGEST_GRACE_S)
        return grace_s

    # ---- WorkerHandler

    def on_ready(self) -> None:
        self._listener.ready()

    def on_progress(self, progress: Progress) -> None:
        self._say(progress_json=documents.encode(progress))
        self._listener.progressed(progress.step)

    def on_checkpoint(self, folder: Path, step: int, samples: int) -> None:
        if self._uploading is None or self._uploading.done():
            self._uploading = asyncio.create_task(self._upload_quietly(folder, step, samples))
            self._uploading.add_done_callback(lambda _: self._settled())
        else:
            self._settled()

    def on_artifact(self, name: str, path: Path) -> None:
        self._artifacts.append((name, path))

    def on_store_call(
        self, operation: str, keys: Sequence[str], value: bytes, expected: bytes, amount: int, timeout_s: float
    ) -> Awaitable[StoreAnswer]:
        return self._tools.store_calls.call(
            self.task.job_id, self.task.fence, operation, keys, value, expected, amount, timeout_s
        )

    def on_log(self, lines: list[str]) -> None:
        self._say(logs=work_pb2.LogLines(lines=lines))

    def on_exit(self, report: ExitReport) -> None:
        if not self._exit.done():
            self._exit.set_result(report)

    # ----

    def _say(self, **body: object) -> None:
        """Output and metrics; what a full disk does not take is dropped, the training goes on."""
        try:
            self._tools.send(self._durable(**body))
        except OSError as error:
            log.warning("output dropped", job=self.task.job_id, reason=str(error))

    def _durable(self, **body: object) -> pb.Durable:
        return pb.Durable(job_id=self.task.job_id, fence=self.task.fence, rank=self.task.rank, **body)  # type: ignore[arg-type]

    async def _upload_quietly(self, folder: Path, step: int, samples: int) -> None:
        try:
            await self._upload(folder, step, samples)
        except (HiveError, OSError) as error:  # the next one will do: this one is only insurance
            log.warning("checkpoint not uploaded", job=self.task.job_id, step=step, reason=str(error))

    async def _upload(self, folder: Path, step: int, samples: int) -> None:
        staging = self._tools.workspaces.staging_dir(self.task, step)
        manifest = await self._tools.transfers.put_folder(folder, staging)
        name = parse_folder(folder.name) or CheckpointName(step)
        checkpoint = Checkpoint(step, samples, manifest, self.task.fence, name.part, name.parts)
        self._tools.send(self._durable(checkpoint_json=documents.encode(checkpoint)))

    def _settled(self) -> None:
        if self._handle is not None:
            self._handle.checkpoint_settled()

    async def _end_upload(self) -> None:
        if self._uploading is not None:
            self._uploading.cancel()
            await asyncio.wait({self._uploading})
