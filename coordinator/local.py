"""A coordinator and N nodes on this one machine, as child processes: `hive up` and `hive demo`.

Owns: the equal shares, starting in order, waiting until all have joined, and ending every process it started, by id and
in order: nodes first. Refuses to go on when one of them ends early: its last lines are the error. Invariant: nothing it
started outlives it, not even when it is killed (the children ask the kernel for a signal).
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from coordinator import connect
from protos import machine_bounds
from protos.errors import DeadlineExceeded, ErrorCode, HiveError, from_document

_START_DEADLINE_S = 60.0
_JOIN_DEADLINE_S = 90.0
_DRAIN_S = 15.0
_POLL_S = 0.2
_LAST_LINES = 8
_PR_SET_PDEATHSIG = 1
_MAX_LINE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Share:
    """What each node is granted of the machine."""

    cpus: float
    memory_bytes: int


def equal_share(nodes: int, cores: float, memory_bytes: int) -> Share:
    """The machine in equal parts, cores to the hundredth."""
    return Share(max(0.01, int(100 * cores / nodes) / 100), memory_bytes // nodes)


def machine_share(nodes: int) -> Share:
    """An equal part of the cores and memory this process may use, counted as the nodes count them."""
    return equal_share(nodes, machine_bounds.available_cores(), machine_bounds.available_memory_bytes())


@dataclass(slots=True)
class _Child:
    name: str
    process: asyncio.subprocess.Process
    log: Path

    def last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-_LAST_LINES:])


@dataclass(slots=True)
class LocalCluster:
    """`async with LocalCluster(home, nodes, share) as cluster`: inside, every node has joined.

    `home` is the coordinator's and the client's HIVE_HOME; each node has its own below home/nodes. Port 0: a free one.
    """

    home: Path
    nodes: int
    share: Share
    port: int = 0
    session_port: int = 0
    address: str = ""
    names: list[str] = field(default_factory=list)
    _coordinator: _Child | None = None
    _nodes: list[_Child] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        try:
            token = await self._start_coordinator()
            for number in range(1, self.nodes + 1):
                await self._start_node(f"local-{number}", token)
            await self._joined()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def pids(self) -> list[int]:
        children = ([self._coordinator] if self._coordinator else []) + self._nodes
        return [child.process.pid for child in children]

    async def ended(self) -> HiveError:
        """Returns once a child ends by itself, with the error that says which and why."""
        assert self._coordinator is not None  # only while up
        waits = {asyncio.create_task(child.process.wait()): child for child in (self._coordinator, *self._nodes)}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        return _early_end(waits[done.pop()])

    async def stop(self) -> None:
        """Nodes drain first, then the coordinator ends; who does not within the deadline is killed with its group."""
        await asyncio.gather(*(_end(child) for child in self._nodes))
        if self._coordinator is not None:
            await _end(self._coordinator)
        self._nodes, self._coordinator = [], None

    async def _start_coordinator(self) -> str:
        arguments = [
            "coordinator.cli.main",
            "coordinator",
            "start",
            "--host",
            "127.0.0.1",
            "--no-advertise",
            "-o",
            "json",
        ]
        arguments += ["--home", str(self.home), "--port", str(self.port), "--session-port", str(self.session_port)]
        child = await _spawn("coordinator", arguments, self.home / "logs", {}, asyncio.subprocess.PIPE)
        self._coordinator = child
        assert child.process.stdout is not None  # asked for
        document = await _first_document(child, child.process.stdout)
        if "error" in document:
            raise from_document(document["error"])
        self.address = document["coordinator"]["address"]
        return str(document["coordinator"]["token"])

    async def _start_node(self, name: str, token: str) -> None:
        arguments = ["node.cli", "start", "--coordinator", self.address, "--name", name, "--allow-root"]
        arguments += ["--no-advertise", "--home", str(self.home / "nodes" / name)]
        arguments += ["--cpus", f"{self.share.cpus:g}", "--memory", str(self.share.memory_bytes)]
        # the token travels in the environment: command lines can be read by every user of the machine
        child = await _spawn(name, arguments, self.home / "logs", {"HIVE_TOKEN": token})
        self._nodes.append(child)
        self.names.append(name)

    async def _joined(self) -> None:
        deadline = time.monotonic() + _JOIN_DEADLINE_S
        async with await connect.connect(connect.ClientConfig(self.home)) as client:
            while True:
                for child in self._nodes:
                    if child.process.returncode is not None:
                        raise _early_end(child)
                found = (await client.nodes())["nodes"]
                present = {node["name"] for node in found if node["link"] == "CONNECTED"}
                if present.issuperset(self.names):
                    return
                if time.monotonic() > deadline:
                    absent = ", ".join(sorted(set(self.names) - present))
                    raise DeadlineExceeded(
                        f"{absent} did not join within {_JOIN_DEADLINE_S:.0f} s",
                        f"see the logs in {self.home / 'logs'}",
                    )
                await asyncio.sleep(_POLL_S)


async def _spawn(
    name: str,
    arguments: list[str],
    logs: Path,
    environment: Mapping[str, str],
    stdout: int | None = None,
) -> _Child:
    logs.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = logs / f"{name}.log"
    with path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout or log,
            stderr=log,
            env=_environment(environment),
            start_new_session=True,  # Ctrl-C in the terminal reaches only us: the order of ending is ours
            preexec_fn=_die_with_parent(),
            limit=_MAX_LINE_BYTES,
        )
    return _Child(name, process, path)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Ours without the settings that would be taken for the child's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HIVE_") or key == "HIVE_DEBUG"}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def _die_with_parent() -> Any:
    """Runs in the child between fork and exec: the library is loaded before."""
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return ask


async def _first_document(child: _Child, stdout: asyncio.StreamReader) -> dict[str, Any]:
    """The JSON document a child prints first: on one line when it is up, on several when it failed."""
    text = b""
    try:
        async with asyncio.timeout(_START_DEADLINE_S):
            while line := await stdout.readline():
                text += line
                try:
                    document: dict[str, Any] = json.loads(text)
                    return document
                except ValueError:
                    continue
    except TimeoutError:
        raise DeadlineExceeded(
            f"the {child.name} did not start within {_START_DEADLINE_S:.0f} s", f"see {child.log}"
        ) from None
    await child.process.wait()
    raise _early_end(child)


def _early_end(child: _Child) -> HiveError:
    return HiveError(
        f"{child.name} ended by itself with exit code {child.process.returncode}:\n{child.last_lines()}",
        f"its whole log is {child.log}",
        code=ErrorCode.UNEXPECTED,
    )


async def _end(child: _Child) -> None:
    process = child.process
    if process.returncode is not None:
        return
    try:
        process.terminate()
        async with asyncio.timeout(_DRAIN_S):
            await process.wait()
    except ProcessLookupError:
        return
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the group is its, and only its
        await process.wait()
