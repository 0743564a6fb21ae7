"""One attempt's life with real worker processes; the coordinator is a fake that can be slow, away or full."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path

from node_bench import MakeBench, make_task, run_async

from node.attempt import Attempt, Listener, Place, Tools
from node.cache import BlobCache
from node.faults import CannotWork
from node.runner import Runner
from node.store_calls import StoreCalls
from node.transfers import Transfers
from node.worker_handle import WorkerHandle
from node.workspace import Workspaces
from protos import documents
from protos.artifact import Artifact, FileEntry, Manifest, digest_bytes
from protos.errors import Exhausted, HiveError
from protos.gen import membership_pb2 as pb
from protos.ids import Digest
from protos.states import AttemptState, Reason, StopMode
from protos.work import Checkpoint, Outcome, Task


class SlowTransfers(Transfers):
    """What travels, noted; it waits at the gate when there is one."""

    def __init__(self) -> None:
        self.gate: asyncio.Event | None = None
        self.waiting = asyncio.Event()
        self.delivering = asyncio.Event()
        self.sent: list[str] = []
        self.broken: HiveError | None = None

    async def _pass(self, what: str) -> None:
        if self.broken is not None:
            raise self.broken
        if self.gate is not None:
            self.waiting.set()
            await self.gate.wait()
        self.sent.append(what)

    async def fetch(self, digest: Digest, destination: Path, n_bytes: int) -> None:
        await self._pass("fetch")
        destination.write_bytes(b"code")

    async def put_artifact(self, name: str, path: Path) -> Artifact:
        self.delivering.set()
        await self._pass(name)
        return Artifact(name, digest_bytes(path.read_bytes()), path.stat().st_size)

    async def put_folder(self, folder: Path, staging: Path) -> Manifest:
        await self._pass(folder.name)
        return Manifest(())


@dataclass
class Daemon:
    """What a daemon does with an attempt, noted in order."""

    runner: Runner
    folder: Path
    disk_is_full: bool = False
    said: list[str] = field(default_factory=list)
    outcome: Outcome | None = None
    unable: list[CannotWork] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.transfers = SlowTransfers()
        self.workspaces = Workspaces(self.folder / "jobs", BlobCache(self.folder / "cache"), self.transfers.fetch)

    def send(self, durable: pb.Durable) -> None:
        if self.disk_is_full:
            raise OSError(28, "No space left on device")
        self.said.append(durable.WhichOneof("body") or "")
        if durable.checkpoint_json:
            self.checkpoints.append(documents.decode(Checkpoint, durable.checkpoint_json))

    def attempt(self, task: Task) -> Attempt:
        def ended(outcome: Outcome) -> None:
            assert self.outcome is None, "ended twice"
            self.outcome = outcome

        listener = Listener(self.is_ready.set, lambda step: self.said.append(f"step {step}"), ended, self.unable.append)
        tools = Tools(self.runner, self.workspaces, self.transfers, StoreCalls(lambda message: True), self.send)
        return Attempt(task, Place("node-a", "", 1.0, (), 1 << 30), tools, listener)

    def left(self, task: Task) -> list[str]:
        folder = self.folder / "jobs" / task.job_id
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def with_code(task: Task) -> Task:
    return replace(task, code=Manifest((FileEntry("model.py", digest_bytes(b"code"), 4),)))


def test_results_are_with_the_coordinator_before_the_attempt_ends(bench: MakeBench, tmp_path: Path) -> None:
    async def body() -> None:
        async with bench() as b:
            daemon, task = Daemon(b.runner, tmp_path), make_task("says_everything")
            await daemon.attempt(task).run()
            assert daemon.outcome is not None and daemon.outcome.state is AttemptState.DONE
            assert [artifact.name for artifact in daemon.outcome.artifacts] == ["model.safetensors"]
            assert "model.safetensors" in daemon.transfers.sent
            assert daemon.said.index("progress_json") < daemon.said.index("step 3") and "logs" in daemon.said
            assert daemon.left(task) == ["checkpoints"]

    run_async(body())


def test_a_stop_is_heard_while_files_are_fetched(bench: MakeBench, tmp_path: Path) -> None:
    """SIGTERM, or a cancel, during a download of hours."""

    async def body() -> None:
        async with bench() as b:
            for mode in StopMode:
                daemon, task = Daemon(b.runner, tmp_path / mode), with_code(make_task("returns"))
                daemon.transfers.gate = asyncio.Event()
                attempt = daemon.attempt(task)
                running = asyncio.create_task(attempt.run())
                await daemon.transfers.waiting.wait()
                await attempt.stop(mode)
                await running
                assert daemon.outcome is not None and daemon.outcome.fault is not None
                assert daemon.outcome.fault.retryable and daemon.outcome.fault.reason is Reason.NODE_LEFT
                assert daemon.left(task) == []
            assert b.runner.warm_pid is None  # no worker was started for it

    run_async(body())


def test_a_cancelled_job_sends_nothing_more_but_a_drain_lets_its_result_out(bench: MakeBench, tmp_path: Path) -> None:
    async def body() -> None:
        async with bench() as b:
            for mode, state in ((StopMode.CANCEL, AttemptState.FAILED), (StopMode.PAUSE, AttemptState.DONE)):
                daemon, task = Daemon(b.runner, tmp_path / mode), make_task("says_everything")
                daemon.transfers.gate = asyncio.Event()
                attempt = daemon.attempt(task)
                running = asyncio.create_task(attempt.run())
                await daemon.transfers.delivering.wait()
                await attempt.stop(mode)
                daemon.transfers.gate.set()
                await running
                assert daemon.outcome is not None and daemon.outcome.state is state

    run_async(body())


def test_a_machine_without_workers_says_so_beside_the_failed_attempt(bench: MakeBench, tmp_path: Path) -> None:
    async def body() -> None:
        async with bench(entry="no_such_module:run") as b:
            daemon, task = Daemon(b.runner, tmp_path), make_task("returns")
            await daemon.attempt(task).run()
            assert daemon.outcome is not None and daemon.outcome.fault is not None and daemon.outcome.fault.retryable
            assert [str(error) for error in daemon.unable] == [daemon.outcome.fault.message]
            assert "no_such_module" in daemon.unable[0].message and "pip install" in daemon.unable[0].hint
            assert daemon.left(task) == []

    run_async(body())


def test_a_full_disk_drops_output_and_not_the_attempt(bench: MakeBench, tmp_path: Path) -> None:
    async def body() -> None:
        async with bench() as b:
            daemon = Daemon(b.runner, tmp_path, disk_is_full=True)
            await daemon.attempt(make_task("says_everything")).run()
            assert daemon.outcome is not None and daemon.outcome.state is AttemptState.DONE
            assert daemon.said == ["step 3"]

    run_async(body())


def test_trouble_with_files_is_a_fault_with_its_reason(bench: MakeBench, tmp_path: Path) -> None:
    async def body() -> None:
        async with bench() as b:
            daemon = Daemon(b.runner, tmp_path)
            daemon.transfers.broken = Exhausted("the disk is full", "free some space")
            await daemon.attempt(with_code(make_task("returns"))).run()
            assert daemon.outcome is not None and daemon.outcome.fault is not None
            assert (daemon.outcome.fault.reason, daemon.outcome.fault.retryable) == (Reason.DISK_FULL, True)

            (tmp_path / "file").write_text("in the way")
            blocked = Daemon(b.runner, tmp_path / "blocked")
            (tmp_path / "blocked" / "jobs" / "j-aaaaaaaa").write_text("in the way")
            await blocked.attempt(make_task("returns")).run()
            assert blocked.outcome is not None and blocked.outcome.fault is not None
            assert "j-aaaaaaaa" in blocked.outcome.fault.message

    run_async(body())


def test_a_daemon_that_ends_takes_the_worker_with_it_and_reports_nothing(bench: MakeBench, tmp_path: Path) -> None:
    async def body() -> None:
        async with bench() as b:
            daemon, task = Daemon(b.runner, tmp_path), make_task("waits_for_stop")
            running = asyncio.create_task(daemon.attempt(task).run())
            await daemon.is_ready.wait()
            handles: list[WorkerHandle] = b.runner.workers
            running.cancel()
            await asyncio.wait({running})
            assert running.cancelled() and daemon.outcome is None
            assert not handles[0].running and daemon.left(task) == []

    run_async(body())


def test_a_worker_hears_when_each_of_its_checkpoints_is_uploaded_or_will_not_be(
    bench: MakeBench, tmp_path: Path
) -> None:
    """1. One is announced and travels. 2. One more is announced: it is let be. 3. The first arrives."""

    async def body() -> None:
        async with bench() as b:
            daemon, task = Daemon(b.runner, tmp_path), make_task("asks_whether_it_uploads")
            daemon.transfers.gate = asyncio.Event()
            running = asyncio.create_task(daemon.attempt(task).run())
            await daemon.is_ready.wait()  # both are announced
            daemon.transfers.gate.set()
            await running
            assert daemon.outcome is not None and daemon.outcome.document == "True True False"
            assert [checkpoint.step for checkpoint in daemon.checkpoints] == [5]

    run_async(body())


def test_a_broken_upload_is_settled_too(bench: MakeBench, tmp_path: Path) -> None:
    async def body() -> None:
        async with bench() as b:
            daemon, task = Daemon(b.runner, tmp_path), make_task("waits_for_its_upload")
            daemon.transfers.broken = Exhausted("the disk is full", "free some space")
            await daemon.attempt(task).run()
            assert daemon.outcome is not None and daemon.outcome.state is AttemptState.DONE
            assert daemon.checkpoints == []

    run_async(body())


def test_who_pauses_hands_over_also_when_the_group_is_held_meanwhile(bench: MakeBench, tmp_path: Path) -> None:
    """The other ranks lose this one, and the coordinator asks whoever still works to hold."""

    async def body() -> None:
        async with bench() as b:
            daemon, task = Daemon(b.runner, tmp_path), make_task("holds_when_stopped")
            daemon.transfers.gate = asyncio.Event()
            attempt = daemon.attempt(task)
            running = asyncio.create_task(attempt.run())
            await daemon.transfers.waiting.wait()
            await asyncio.gather(attempt.stop(StopMode.PAUSE), attempt.stop(StopMode.HOLD))
            daemon.transfers.gate = None
            await running
            assert [checkpoint.step for checkpoint in daemon.checkpoints] == [5]

    run_async(body())


def test_the_newest_checkpoint_is_handed_over_when_this_node_pauses(bench: MakeBench, tmp_path: Path) -> None:
    """The periodic upload of the same folder may be under way: it gives way."""

    async def body() -> None:
        async with bench() as b:
            daemon, task = Daemon(b.runner, tmp_path), make_task("holds_when_stopped")
            daemon.transfers.gate = asyncio.Event()
            attempt = daemon.attempt(task)
            running = asyncio.create_task(attempt.run())
            await daemon.transfers.waiting.wait()  # the periodic upload
            await attempt.stop(StopMode.PAUSE)
            daemon.transfers.gate = None  # the one under way waits for ever, the next one passes
            await running
            assert [checkpoint.step for checkpoint in daemon.checkpoints] == [5]
            assert daemon.outcome is not None and daemon.outcome.held_step == 5

    run_async(body())
