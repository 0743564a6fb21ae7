"""The synchronous face of the client for programs and notebooks; `import hive` re-exports it.

Owns: one event loop in a thread of its own, so that every call works inside and outside a running loop, and one client
per process that is opened on first use. Refuses nothing the coordinator allows: it adds no meaning to the documents.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from coordinator import connect
from protos.errors import JobFailed
from protos.states import TERMINAL_JOB_STATES

if TYPE_CHECKING:
    from coordinator.bundle import Bundle
    from coordinator.client import Client

T = TypeVar("T")
JobFile = str | os.PathLike[str] | Mapping[str, Any]

_CLOSE_S = 5.0


class _Loop:
    """The thread, the loop and the client of this process; replaced when the environment means another coordinator."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Client | None = None
        self._config: connect.ClientConfig | None = None
        self._pid = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine; Ctrl-C stops the waiting and the coroutine, not the job."""
        future = asyncio.run_coroutine_threadsafe(work, self._running())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def client(self) -> Client:
        config = connect.load()
        if self._client is None or config != self._config:
            if self._client is not None:
                await self._client.close()
            self._client, self._config = await connect.connect(config), config
        return self._client

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():  # a fork has the object but not the thread
                self._loop, self._client, self._pid = asyncio.new_event_loop(), None, os.getpid()
                threading.Thread(target=self._loop.run_forever, name="hive-sdk", daemon=True).start()
                atexit.register(self.close)
            return self._loop

    def close(self) -> None:
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None or self._pid != os.getpid():
            return
        if self._client is not None:
            closing = asyncio.run_coroutine_threadsafe(self._client.close(), loop)
            try:
                closing.result(_CLOSE_S)
            except TimeoutError:
                closing.cancel()
            self._client = None
        loop.call_soon_threadsafe(loop.stop)


_loop = _Loop()


class Job:
    """A job of the coordinator, by its id."""

    def __init__(self, job_id: str) -> None:
        self.id = job_id

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def show(self) -> dict[str, Any]:
        """The job document of docs/json.md."""

        async def work() -> dict[str, Any]:
            return await (await _loop.client()).show(self.id)

        return _job(_loop.run(work()))

    @property
    def state(self) -> str:
        """SUBMITTED ... SUCCEEDED, FAILED or CANCELLED."""
        return str(self.show()["state"])

    def wait(self, timeout_s: float | None = None) -> Job:
        """Until the job has ended. Raises JobFailed unless it SUCCEEDED, TimeoutError when it goes on for longer."""

        async def work() -> dict[str, Any]:
            client = await _loop.client()
            document = _job(await client.show(self.id))
            if document["state"] in TERMINAL_JOB_STATES:
                return document
            async with asyncio.timeout(timeout_s):
                return _job(await client.wait(self.id, after_seq=document.get("seq") or 0))

        document = _loop.run(work())
        if document["state"] != "SUCCEEDED":
            message = document.get("message") or f"reason {document.get('reason')}"
            raise JobFailed(
                f"job {self.id} ended {document['state']}: {message}",
                document.get("hint") or f"see job.logs() or hive logs {self.id}",
            )
        return self

    def metrics(self, after_step: int = 0) -> list[dict[str, Any]]:
        """The records of metrics.jsonl so far: time step epoch stage loss accuracy samples_per_s ... node."""

        async def work() -> list[dict[str, Any]]:
            document = await (await _loop.client()).metrics(self.id, after_step)
            records: list[dict[str, Any]] = document["metrics"]
            return records

        return _loop.run(work())

    def logs(self, rank: int = 0) -> str:
        """What one worker has printed so far."""

        async def work() -> str:
            client = await _loop.client()
            return "".join([piece.text async for piece in client.logs(self.id, rank)])

        return _loop.run(work())

    def cancel(self) -> Job:
        return self._control("cancel")

    def pause(self) -> Job:
        return self._control("pause")

    def resume(self) -> Job:
        return self._control("resume")

    def artifacts(self, outdir: str | os.PathLike[str]) -> list[Path]:
        """Fetch what the job made into a folder, each file checked; their paths."""

        async def work() -> list[Path]:
            client = await _loop.client()
            made = _job(await client.show(self.id)).get("artifacts") or []
            return await client.fetch(made, Path(outdir))

        return _loop.run(work())

    def explain(self) -> dict[str, Any]:
        """The plan with what was measured beside each prediction."""

        async def work() -> dict[str, Any]:
            return await (await _loop.client()).explain(self.id)

        return _loop.run(work())

    def _control(self, action: str) -> Job:
        async def work() -> dict[str, Any]:
            return await (await _loop.client()).control(self.id, action)

        _loop.run(work())
        return self


def submit(job: JobFile, wait: bool = False) -> Job:
    """Submit a job file, or the same as a dict (its paths relative to the working directory)."""
    bundle = _bundle(job)

    async def work() -> str:
        client = await _loop.client()
        await client.upload(bundle)
        return str(_job(await client.submit(bundle))["id"])

    submitted = Job(_loop.run(work()))
    return submitted.wait() if wait else submitted


def plan(job: JobFile) -> dict[str, Any]:
    """What hive would do with a job: the document of `hive plan -o json`."""
    bundle = _bundle(job)

    async def work() -> dict[str, Any]:
        client = await _loop.client()
        await client.upload(bundle)
        return await client.plan(bundle)

    return _loop.run(work())


def nodes() -> list[dict[str, Any]]:
    """The machines: the list of `hive nodes -o json`."""

    async def work() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await (await _loop.client()).nodes())["nodes"]
        return found

    return _loop.run(work())


def jobs(everything: bool = False) -> list[dict[str, Any]]:
    """The jobs that are not finished, or all: the list of `hive ps -o json`."""

    async def work() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await (await _loop.client()).list_jobs(everything))["jobs"]
        return found

    return _loop.run(work())


def _job(document: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = document["job"]
    return job


def _bundle(job: JobFile) -> Bundle:
    from coordinator.bundle import bundle
    from coordinator.jobfile import read_job
    from protos.jobspec import parse

    if isinstance(job, Mapping):
        return bundle(parse(dict(job)), Path.cwd())
    path = Path(job)
    return bundle(read_job(path), path.parent)


__all__ = ["Job", "jobs", "nodes", "plan", "submit"]
