"""Runs one rank of a task in a process of its own, the way a node would: `python engine_harness.py CONFIG.json`.

The rendezvous store is a TCPStore of the test process behind the KeyValueStore protocol; what the task says on its
channel is appended to `progress.jsonl`; a line `hold` | `pause` | `cancel` on stdin is a stop request.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from protos import documents, jobspec
from protos.errors import DeadlineExceeded
from protos.ids import Fence, JobId
from protos.states import StopMode
from protos.work import Outcome, Progress, Task, TaskKind
from strategies.context import TaskContext, Workspace

DEADLINE_S = 60.0
ROOT = Path(__file__).resolve().parents[2]


class TestStore:
    """KeyValueStore over a TCPStore client."""

    __test__ = False

    def __init__(self, port: int) -> None:
        import torch.distributed as dist

        self._store = dist.TCPStore("127.0.0.1", port, None, False)
        self._error = dist.DistError

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def get(self, key: str, timeout_s: float) -> bytes:
        self.wait([key], timeout_s)
        return bytes(self._store.get(key))

    def add(self, key: str, amount: int) -> int:
        return self._store.add(key, amount)

    def check(self, keys: Sequence[str]) -> bool:
        return self._store.check(list(keys))

    def wait(self, keys: Sequence[str], timeout_s: float) -> None:
        try:
            self._store.wait(list(keys), timedelta(seconds=timeout_s))
        except self._error as error:
            raise DeadlineExceeded(str(error).splitlines()[0]) from None

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        return bytes(self._store.compare_set(key, expected.decode(), desired.decode()))

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(key)

    def num_keys(self) -> int:
        return self._store.num_keys()


class RecordingChannel:
    """Channel that records to files (subprocess) or to memory (in the test process), and can stop the task."""

    def __init__(
        self, store: Any = None, log: Path | None = None, stop_at_step: int | None = None, upload_s: float = 0.0
    ) -> None:
        self.store = store
        self._upload_s = upload_s  # how long each checkpoint is on its way
        self._uploaded_s = 0.0
        self.records: list[dict[str, Any]] = []
        self._log = log.open("a", buffering=1) if log else None
        self._mode: StopMode | None = None
        self._callbacks: list[Callable[[StopMode], None]] = []
        self._stop_at_step = stop_at_step
        self.leave: Callable[[Outcome], None] = lambda outcome: self.record("left")  # a process of its own ends

    def record(self, kind: str, **values: Any) -> None:
        entry = {"kind": kind, **values}
        self.records.append(entry)
        if self._log:
            self._log.write(json.dumps(entry) + "\n")

    def ready(self) -> None:
        self.record("ready")

    def progress(self, progress: Progress) -> None:
        self.record("progress", **documents.plain(progress))
        if self._stop_at_step is not None and progress.step >= self._stop_at_step:
            self.stop(StopMode.PAUSE)

    def checkpoint(self, folder: Path, step: int, samples: int) -> None:
        self.record("checkpoint", folder=str(folder), step=step, samples=samples, refused=self.uploading())
        self._uploaded_s = max(self._uploaded_s, time.monotonic() + self._upload_s)

    def uploading(self) -> bool:
        return time.monotonic() < self._uploaded_s

    def artifact(self, name: str, path: Path) -> None:
        self.record("artifact", name=name, path=str(path), bytes=path.stat().st_size)

    def stop_requested(self) -> StopMode | None:
        return self._mode

    def on_stop(self, callback: Callable[[StopMode], None]) -> None:
        self._callbacks.append(callback)

    def stop(self, mode: StopMode) -> None:
        if self._mode is None:
            self._mode = mode
            threading.Thread(target=self._call, args=(mode,), daemon=True).start()

    def _call(self, mode: StopMode) -> None:
        for callback in self._callbacks:
            callback(mode)

    def metrics(self, stage: str = "train") -> list[dict[str, Any]]:
        return metrics_of(self.records, stage)


def metrics_of(records: list[dict[str, Any]], stage: str = "train") -> list[dict[str, Any]]:
    found = [metric for record in records if record["kind"] == "progress" for metric in record["metrics"]]
    return [metric for metric in found if metric["stage"] == stage]


@dataclass
class Job:
    """A job laid out in a folder: code/, data.npz, and per node checkpoints and outputs."""

    folder: Path
    document: dict[str, Any]
    code: dict[str, str]
    data: Path | None = None
    test: Path | None = None
    batch: int = field(init=False)

    def __post_init__(self) -> None:
        self.spec = jobspec.parse(self.document)
        self.batch = self.spec.train.batch_size
        (self.folder / "code").mkdir(parents=True, exist_ok=True)
        for name, source in self.code.items():
            (self.folder / "code" / name).write_text(source)

    def workspace(self, node: str, attempt: str = "0") -> Workspace:
        checkpoints = self.folder / node / "checkpoints"
        output = self.folder / node / f"output-{attempt}"
        shutil.rmtree(output, ignore_errors=True)
        checkpoints.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True)
        return Workspace(self.folder / "code", self.data, self.test, None, checkpoints, output)

    def task(self, rank: int = 0, samples: tuple[int, ...] | None = None, fence: int = 1, **values: Any) -> Task:
        samples = samples or (self.batch,)
        world_size = values.pop("world_size", len(samples))
        strategy = "single_node" if world_size == 1 else "data_parallel"
        return Task(
            TaskKind.TRAIN, JobId("j-test"), Fence(fence), rank, world_size, strategy, self.spec, samples, **values
        )

    def run_here(
        self,
        node: str = "one",
        attempt: str = "0",
        stop_at_step: int | None = None,
        memory_bytes: int | None = None,
        **values: Any,
    ) -> Any:
        """One rank in this process. Returns (outcome, channel)."""
        from strategies.run_torch import run

        channel = RecordingChannel(stop_at_step=stop_at_step)
        context = TaskContext(
            self.task(**values), self.workspace(node, attempt), channel, "", 1, "cpu", node, memory_bytes
        )
        return run(context), channel


class Rank:
    """A rank in a process of its own."""

    def __init__(
        self,
        job: Job,
        port: int,
        node: str,
        task: Task,
        attempt: str = "0",
        upload: float | None = None,
        memory_bytes: int | None = None,
        upload_s: float = 0.0,
        harness: str = "engine_harness",
    ) -> None:
        self.folder = job.folder / f"{node}-run-{attempt}"
        self._node_folder = job.folder / node
        self.folder.mkdir(parents=True, exist_ok=True)
        workspace = job.workspace(node, attempt)
        config = {
            "task": json.loads(documents.encode(task)),
            "workspace": documents.plain(workspace),
            "port": port,
            "node": node,
            "folder": str(self.folder),
            "upload": upload,
            "memory_bytes": memory_bytes,
            "upload_s": upload_s,
        }
        (self.folder / "config.json").write_text(json.dumps(config))
        self.log = self.folder / "progress.jsonl"
        (self.folder / "stderr").touch()
        from warm_ranks import WarmProcess  # it lies beside this file

        self.process = WarmProcess(self.folder / "config.json", harness)

    def records(self) -> list[dict[str, Any]]:
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def say(self, word: str) -> None:
        self.process.stdin.write(f"{word}\n".encode())

    def outcome(self, timeout_s: float = DEADLINE_S) -> Outcome:
        self.process.wait(timeout_s)
        path = self.folder / "outcome.json"
        assert path.exists(), (self.folder / "stderr").read_text()
        return documents.decode(Outcome, path.read_text())

    def wait_until(self, condition: Callable[[list[dict[str, Any]]], bool], timeout_s: float = DEADLINE_S) -> None:
        """Polls the records file (written by another process) with a deadline."""
        deadline = time.monotonic() + timeout_s
        while not condition(self.records()):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f"did not get there: {(self.folder / 'stderr').read_text()[-2000:]}")
            threading.Event().wait(0.01)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.process.stdin.close()

    def remove(self) -> None:
        """What its node has kept, and what it has handed over."""
        shutil.rmtree(self._node_folder)


def run_rank(path: Path) -> None:
    """Ends the process."""
    import torch

    from strategies.run_torch import run

    torch.set_num_threads(1)
    config = json.loads(path.read_text())
    folder = Path(config["folder"])
    channel = RecordingChannel(TestStore(config["port"]), folder / "progress.jsonl", upload_s=config["upload_s"])

    def leave(outcome: Outcome) -> None:
        (folder / "outcome.json").write_bytes(documents.encode(outcome))
        sys.stdout.flush()
        os._exit(0)

    channel.leave = leave

    def listen() -> None:
        for line in sys.stdin:
            channel.stop(StopMode(line.strip()))

    threading.Thread(target=listen, daemon=True).start()
    workspace = Workspace(**{name: Path(value) if value else None for name, value in config["workspace"].items()})
    task = documents.decode(Task, json.dumps(config["task"]))
    limits = config["memory_bytes"], config["upload"]
    leave(run(TaskContext(task, workspace, channel, "lo", 1, "cpu", config["node"], *limits)))


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
