"""The seam between a strategy and the machine it runs on.

A strategy's torch half is handed a TaskContext and returns an Outcome. It never asks how bytes travel, where files come
from, or who may stop it: the node provides these through `Channel` and `Workspace`. Tests provide their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from protos.states import StopMode
from protos.work import Outcome, Progress, Task


class KeyValueStore(Protocol):
    """What a rendezvous needs: the operations of torch.distributed.Store, one name space per (job, fence).

    Every call raises DeadlineExceeded (protos.errors) when it is not answered within `timeout_s`.
    """

    def set(self, key: str, value: bytes) -> None: ...
    def get(self, key: str, timeout_s: float) -> bytes: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: Sequence[str]) -> bool: ...
    def wait(self, keys: Sequence[str], timeout_s: float) -> None: ...
    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes: ...
    def delete_key(self, key: str) -> bool: ...
    def num_keys(self) -> int: ...


class Channel(Protocol):
    """What a running task may say and ask. Calls never block for long: the node buffers."""

    @property
    def store(self) -> KeyValueStore: ...

    def ready(self) -> None:
        """The group exists and the state is in place: from here to the end no coordinator is needed."""

    def progress(self, progress: Progress) -> None: ...

    def checkpoint(self, folder: Path, step: int, samples: int) -> None:
        """A committed checkpoint lies in `folder` (one rank per part): the node uploads it in the background, or lets
        it be while it still uploads the last one."""

    def uploading(self) -> bool:
        """Whether an announced checkpoint is still on its way. Cheap enough for every step."""

    def artifact(self, name: str, path: Path) -> None:
        """A result file, finished and fsynced: the node uploads it before it reports DONE."""

    def leave(self, outcome: Outcome) -> None:
        """The task's outcome, from another thread than its own, which cannot come back: ends this process."""

    def stop_requested(self) -> StopMode | None:
        """Cheap enough for every step."""

    def on_stop(self, callback: Callable[[StopMode], None]) -> None:
        """Called once from another thread when a stop arrives: the place to break a blocked collective."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where this task's files lie on this node. Paths exist when the task has the matching manifest."""

    code_dir: Path | None
    data_path: Path | None  # a file, or a folder when the source is a folder
    test_path: Path | None
    weights_path: Path | None
    checkpoint_dir: Path  # shared by all attempts of the job on this node; see checkpoint_torch
    output_dir: Path  # fresh for this attempt


@dataclass(frozen=True, slots=True)
class TaskContext:
    task: Task
    workspace: Workspace
    channel: Channel
    interface: str  # what a group binds to: an address of this machine, or an interface; "" is nothing that is trusted
    threads: int
    device: str  # "cpu" or "cuda:N"
    node_name: str
    memory_bytes: int | None = None  # what this rank may use of the node's memory: its share of what the owner allows
    max_upload_bytes_per_s: float | None = None  # of this rank to the others: its share of what the owner allows
