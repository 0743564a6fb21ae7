"""Runs tasks in worker processes forked from a warm parent, under the node's caps; ends and reports every one of them.

Owns: the warm parent (started on demand, again if it dies, ended when idle), the CPU and memory caps of all workers
together, the watch over them. Refuses: knowing what a job is. Invariant: after `close`, or after the daemon's death
however it came, no process that this started is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from node import cpu_limit as cpu_limits
from node import memory_watch
from node.channel import Frame
from node.cpu_limit import CpuLimit
from node.exit_report import ExitKind, ExitReport
from node.limits import Caps, show_bytes
from node.warm_client import Fork, WarmClient
from node.worker_environment import clean_environment, device_environment
from node.worker_handle import StoreAnswer, StoreResult, WorkerHandle, WorkerHandler
from protos import documents
from protos.errors import Conflict
from protos.log import Log
from protos.work import Task
from strategies.context import Workspace

ENTRY = "strategies.run_torch:run"
IDLE_S = 600.0
_MEMORY_EVERY_S = 0.25
_PING_EVERY_TICKS = 4
_ASLEEP_S = 3.0  # a tick this late means the machine or the daemon was stopped: nobody could be heard meanwhile
_CLOSE_S = 10.0

_log = Log("hive.node.runner")

__all__ = ["ExitKind", "ExitReport", "Runner", "StoreAnswer", "StoreResult", "WorkerHandle", "WorkerHandler"]


class Runner:
    """One per daemon. `home` is HIVE_HOME: the warm parent's working folder."""

    def __init__(
        self, caps: Caps, home: Path, cpu_limit: CpuLimit, *, entry: str = ENTRY, idle_s: float = IDLE_S
    ) -> None:
        self.cpu_limit = cpu_limit
        self._caps = caps
        self._home = home
        self._entry = entry
        self._idle_s = idle_s
        self._parent: WarmClient | None = None
        self._torch: str | None = None
        self._starting = asyncio.Lock()
        self._handles: set[WorkerHandle] = set()
        self._lives: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._enforce: asyncio.Task[None] | None = None
        self._idle: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def torch_version(self) -> str | None:
        """Of the workers; None until one was started."""
        return self._torch

    @property
    def warm_pid(self) -> int | None:
        return self._parent.pid if self._parent is not None and self._parent.alive else None

    @property
    def workers(self) -> list[WorkerHandle]:
        return list(self._handles)

    async def start(
        self,
        task: Task,
        workspace: Workspace,
        interface: str,
        threads: int,
        device: str,
        node_name: str,
        handler: WorkerHandler,
        memory_bytes: int | None = None,
        max_upload_bytes_per_s: float | None = None,
    ) -> WorkerHandle:
        """A worker that runs the task now. Raises HiveError when no worker can be started; then nothing was called."""
        workspace.output_dir.mkdir(parents=True, exist_ok=True)
        workspace.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        visible, inner_device = device_environment(device)
        header = {
            "kind": "task",
            "workspace": documents.encode(workspace).decode(),
            "interface": interface,
            "threads": threads,
            "device": inner_device,
            "node_name": node_name,
            "memory_bytes": memory_bytes,
            "max_upload_bytes_per_s": max_upload_bytes_per_s,
        }
        first = Frame(header, documents.encode(task))
        async with self._starting:
            parent = await self._warm()
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            read_end, write_end = os.pipe()
            handle = WorkerHandle(ours, read_end, workspace, handler)
            request = Fork(theirs.detach(), write_end, self.cpu_limit.join, visible, workspace.output_dir)
            try:
                pid = await parent.fork(request, handle.exited)
            except BaseException:
                ours.close()
                os.close(read_end)
                self._rest()
                raise
            self._handles.add(handle)
            life = asyncio.create_task(self._live(handle, pid, first))
            self._lives.add(life)
            life.add_done_callback(self._lives.discard)
            self._keep_watch()
        return handle

    async def warm(self) -> str | None:
        """Starts the warm parent ahead of the first task; returns the workers' version of torch."""
        async with self._starting:
            await self._warm()
            if not self._handles:
                self._rest()
        return self._torch

    async def close(self) -> None:
        """Ends every worker and the warm parent, bounded; what was running is reported as killed."""
        self._closed = True
        for handle in list(self._handles):
            handle.kill_now(ExitKind.KILLED, "the node is stopping")
        if self._lives:
            await asyncio.wait(set(self._lives), timeout=_CLOSE_S / 2)
        if self._parent is not None:  # also one that is still importing: its start then raises
            await self._parent.close()
        if self._lives:  # their parent is gone now, and so are they
            await asyncio.wait(set(self._lives), timeout=_CLOSE_S / 2)
        tasks = [task for task in (self._watch, self._enforce, self._idle, *self._lives) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.cpu_limit.close()

    async def _warm(self) -> WarmClient:
        if self._closed:
            raise Conflict("the node is stopping", "start the task elsewhere")
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._parent is not None and self._parent.alive:
            return self._parent
        if self._parent is not None:
            await self._parent.close()  # reaps a process that ended by itself
        environment = clean_environment(os.environ, self._caps.cpus or os.cpu_count() or 1)
        self._parent = WarmClient(self._entry, self._home, environment)
        self._torch = await self._parent.start()
        return self._parent

    async def _live(self, handle: WorkerHandle, pid: int, first: Frame) -> None:
        try:
            await handle.live(pid, first)
        finally:
            self._handles.discard(handle)
            if not self._handles:
                self._rest()

    def _roots(self) -> list[int]:
        return [handle.pid for handle in self._handles if handle.running and handle.pid]

    def _keep_watch(self) -> None:
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_workers())
        if self._enforce is None:
            self._enforce = asyncio.create_task(self.cpu_limit.enforce(self._roots))

    def _rest(self) -> None:
        """No worker is left: nothing ticks any more, and the warm parent ends after the idle time."""
        for task in (self._watch, self._enforce):
            if task is not None:
                task.cancel()
        self._watch = self._enforce = None
        if self._idle is None and not self._closed:
            self._idle = asyncio.create_task(self._end_idle())

    async def _end_idle(self) -> None:
        await asyncio.sleep(self._idle_s)
        async with self._starting:
            if not self._handles and self._parent is not None:
                self._idle = None  # past cancelling: a start that waits for the lock makes a new parent
                await self._parent.close()
                self._parent = None

    async def _watch_workers(self) -> None:
        loop = asyncio.get_running_loop()
        before_s = loop.time()
        tick = 0
        while True:
            await asyncio.sleep(_MEMORY_EVERY_S)
            now_s = loop.time()
            if now_s - before_s > _ASLEEP_S:
                for handle in self._handles:
                    handle.heard(now_s)
            before_s = now_s
            tick += 1
            with contextlib.suppress(OSError):
                await self._check_memory()
            if tick % _PING_EVERY_TICKS == 0:
                for handle in self._handles:
                    if handle.running:
                        handle.check_alive(now_s)

    async def _check_memory(self) -> None:
        cap = self._caps.memory_bytes
        handles = {handle.pid: handle for handle in self._handles if handle.running and handle.pid}
        parent_pid = self.warm_pid
        if not handles or parent_pid is None:
            return
        reading = await asyncio.to_thread(memory_watch.read, parent_pid, list(handles), cap)
        for pid, tree_bytes in reading.workers.items():
            handles[pid].memory(tree_bytes)
        guilty = memory_watch.culprit(reading, cap)
        if guilty is not None and cap is not None:
            used = show_bytes(reading.workers[guilty])
            message = f"the worker used {used}; with the rest of hive that is {show_bytes(reading.total_bytes)}"
            message += f", over the granted {show_bytes(cap)}"
            _log.warning("worker_over_memory", pid=guilty, bytes=reading.workers[guilty], cap_bytes=cap)
            handles[guilty].kill_now(ExitKind.MEMORY, message)


async def make_runner(
    caps: Caps, home: Path, available_cores: float, *, entry: str = ENTRY, idle_s: float = IDLE_S
) -> Runner:
    """A Runner with the best CPU mechanism that works here. The folder is made when it is missing."""
    home.mkdir(parents=True, exist_ok=True)
    return Runner(caps, home, await cpu_limits.choose(caps.cpus, available_cores), entry=entry, idle_s=idle_s)
