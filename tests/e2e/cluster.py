"""A real cluster of processes on loopback: one coordinator, some nodes, the CLI. Everything below one folder.

Waits are on events (log lines, CLI answers) with deadlines. `close` ends every process by pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator import connect

CALIBRATION = Path("node") / "calibration"
DEADLINE_S = 60.0


def until(check: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Ask until the answer is true. The only waiting loop of these tests."""
    end = time.monotonic() + deadline_s
    while True:
        if answer := check():
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s:.0f} s: {what}")
        time.sleep(0.05)


@dataclass
class Process:
    """One daemon and its log."""

    name: str
    home: Path
    arguments: list[str]
    environment: dict[str, str]
    prefix: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.home.parent / f"{self.name}.log"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", *self.arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.home.parent,
            )

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(10)

    def end(self) -> int:
        """SIGTERM, then whatever it takes; the exit code."""
        if self.process is None or self.process.poll() is not None:
            return 0 if self.process is None else self.process.returncode
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass
class Cluster:
    folder: Path
    calibration: Path | None = None  # measured once per test run, shared by nodes of equal caps
    host: str = "127.0.0.1"
    coordinator: Process | None = None
    nodes: dict[str, Process] = field(default_factory=dict)
    address: str = ""
    token: str = ""
    session_port: int = 0
    program: str = "coordinator.cli.main"  # the module that starts the coordinator

    def environment(self, home: Path) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HIVE_")}
        root = str(Path(__file__).parents[2])
        return {**kept, "HIVE_HOME": str(home), "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}

    @property
    def home(self) -> Path:
        return self.folder / "coordinator"

    def start_coordinator(self, *flags: str, prefix: list[str] | None = None) -> None:
        """The first start takes free ports; later ones the same ports again."""
        self.home.mkdir(parents=True, exist_ok=True)
        port, session_port = (self.address.rpartition(":")[2], str(self.session_port)) if self.address else ("0", "0")
        arguments = [self.program, "coordinator", "start", "--host", self.host, "--port", port]
        arguments += ["--session-port", session_port, "-o", "json", *(flags or ("--no-advertise",))]
        self.coordinator = Process("coordinator", self.home, arguments, self.environment(self.home), prefix or [])
        before = len(self.coordinator.said())
        self.coordinator.start()
        started = self.coordinator

        def ready() -> dict[str, Any] | None:
            assert started.process is not None
            if started.process.poll() is not None:
                raise AssertionError(f"the coordinator ended: {started.said()[-2000:]}")
            for line in started.said()[before:].splitlines():
                with contextlib.suppress(ValueError):
                    document = json.loads(line)
                    if isinstance(document, dict) and "coordinator" in document:
                        return dict(document["coordinator"])
            return None

        said = until(ready, "the coordinator listens")
        self.address, self.token, self.session_port = said["address"], said["token"], said["session_port"]

    def start_node(
        self, name: str, cpus: float = 1, memory: str = "2GiB", *flags: str, prefix: list[str] | None = None
    ) -> Process:
        home = self.folder / name
        if self.calibration is not None and self.calibration.exists() and not (home / CALIBRATION).exists():
            shutil.copytree(self.calibration, home / CALIBRATION)
        home.mkdir(parents=True, exist_ok=True)
        arguments = ["node.cli", "start", "--name", name, "--token", self.token, "--coordinator", self.address]
        arguments += ["--cpus", str(cpus), "--memory", memory, "--allow-root", "--home", str(home)]
        arguments += list(flags or ("--no-advertise",))
        node = Process(name, home, arguments, self.environment(home), prefix or [])
        self.nodes[name] = node
        node.start()
        return node

    def start(self, cpus: Sequence[float] = (1, 1)) -> Cluster:
        """A coordinator and one node per number of cores."""
        self.start_coordinator()
        for number, cores in enumerate(cpus):
            self.start_node(f"n{number}", cores)
        self.wait_ready(len(cpus))
        return self

    def states(self) -> dict[str, str]:
        return {node["name"]: f"{node['link']} {node['activity']}" for node in self.show_nodes()}

    def wait_ready(self, nodes: int, deadline_s: float = 120.0) -> list[dict[str, Any]]:
        """So many nodes are connected, measured and idle."""

        def idle() -> list[dict[str, Any]]:
            for name, node in self.nodes.items():
                if node.process is not None and node.process.poll() is not None:
                    raise AssertionError(f"{name} ended")
            found = [n for n in self.show_nodes() if (n["link"], n["activity"]) == ("CONNECTED", "IDLE")]
            return found if len(found) >= nodes else []

        try:
            ready: list[dict[str, Any]] = until(idle, f"{nodes} nodes are ready", deadline_s)
        except AssertionError as error:
            logs = "\n".join(f"--- {name}\n{node.said()[-1500:]}" for name, node in self.nodes.items())
            raise AssertionError(f"{error}\n{logs}") from None
        for name in self.nodes if self.calibration is not None else ():
            measured = self.folder / name / CALIBRATION
            if self.calibration is not None and measured.exists():
                shutil.copytree(measured, self.calibration, dirs_exist_ok=True)
        return ready

    def hive(
        self, *arguments: str, check: bool = True, deadline_s: float = 180.0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """`hive` as the coordinator's owner; `environment` changes that."""
        command = ["coordinator.cli.main", *arguments]
        return self.run(command, {**self.environment(self.home), **environment}, check, deadline_s)

    def hive_node(
        self, name: str, *arguments: str, check: bool = True, deadline_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """`hive-node` as the owner of a node."""
        return self.run(["node.cli", *arguments], self.environment(self.folder / name), check, deadline_s)

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], check: bool = True, deadline_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def ask(self, *arguments: str, check: bool = True, deadline_s: float = 180.0) -> dict[str, Any]:
        """A command with -o json; its document."""
        answer: dict[str, Any] = json.loads(
            self.hive(*arguments, "-o", "json", check=check, deadline_s=deadline_s).stdout
        )
        return answer

    def show_nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("nodes")["nodes"]
        return found

    def jobs(self, everything: bool = False) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("ps", *(["--all"] if everything else []))["jobs"]
        return found

    def submit(self, job: Path, *sets: str) -> str:
        flags = [part for each in sets for part in ("--set", each)]
        return str(self.ask("submit", str(job), *flags)["job"]["id"])

    def show(self, job_id: str) -> dict[str, Any]:
        """Over a connection of this process: a program that starts for each question would answer too late."""

        async def asked() -> dict[str, Any]:
            async with await connect.connect(connect.load(environment=self.environment(self.home))) as client:
                return await client.show(job_id)

        job: dict[str, Any] = asyncio.run(asked())["job"]
        return job

    def wait_step(self, job_id: str, step: int, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """The job has committed this many steps."""

        def reached() -> dict[str, Any] | None:
            job = self.show(job_id)
            if job["state"] in ("SUCCEEDED", "FAILED", "CANCELLED"):
                raise AssertionError(f"{job_id} ended before step {step}: {job['state']} {job['message']}")
            return job if job["step"] >= step else None

        found: dict[str, Any] = until(reached, f"{job_id} reaches step {step}", deadline_s)
        return found

    def wait(self, job_id: str, deadline_s: float = 120.0) -> dict[str, Any]:
        """The job's document once it has ended, however it ended."""
        self.hive("wait", job_id, check=False, deadline_s=deadline_s)
        return self.show(job_id)

    def wait_state(self, job_id: str, *states: str, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            job = self.show(job_id)
            return job if job["state"] in states else None

        found: dict[str, Any] = until(reached, f"{job_id} is {' or '.join(states)}", deadline_s)
        return found

    def events(self, *flags: str) -> list[dict[str, Any]]:
        """The event log."""
        lines = self.hive("events", *flags, "-o", "json").stdout.splitlines()
        return [json.loads(line) for line in lines]

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        """The training records of metrics.jsonl."""
        lines = self.artifact(job_id, "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["stage"] == "train"]

    def artifact(self, job_id: str, name: str) -> Path:
        folder = self.folder / "results" / job_id
        if not (folder / name).exists():
            self.hive("artifacts", "get", job_id, str(folder))
        return folder / name

    def worker_pids(self, name: str) -> list[int]:
        """Worker processes of a node: children of its warm parent."""
        import psutil

        parents = psutil.Process(self.nodes[name].pid).children()
        return [worker.pid for parent in parents for worker in parent.children()]

    def heal(self) -> None:
        """Start again whatever a test has killed, and wait until all is as at first."""
        for process in (self.coordinator, *self.nodes.values()):
            if process is not None and process.process is not None and process.process.poll() is None:
                process.kill(signal.SIGCONT)
        if self.coordinator is None or self.coordinator.process is None or self.coordinator.process.poll() is not None:
            self.start_coordinator()
        for node in self.nodes.values():
            if node.process is None or node.process.poll() is not None:
                node.start()
        self.wait_ready(len(self.nodes))

    def close(self) -> None:
        for process in (*self.nodes.values(), self.coordinator):
            if process is not None:
                process.end()


@contextlib.contextmanager
def start_cluster(folder: Path, calibration: Path | None, cpus: Sequence[float]) -> Iterator[Cluster]:
    made = Cluster(folder, calibration)
    try:
        yield made.start(cpus)
    finally:
        made.close()


def cluster(
    folder: Path, calibration: Path | None, nodes: int = 2, cpus: float = 1
) -> contextlib.AbstractContextManager[Cluster]:
    return start_cluster(folder, calibration, (cpus,) * nodes)
