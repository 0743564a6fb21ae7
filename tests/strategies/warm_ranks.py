"""Processes at the price of a fork: `python warm_ranks.py` imports torch and the engines once, then forks a process for
each configuration it is told. `WarmProcess` is the side of the tests, with what they need of subprocess.Popen; what
else many of them need is imported once as well, by `import_once`.

The server ends with the test process, and takes with it what it forked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
ROOT = HERE.resolve().parents[1]
STDIN, STDOUT, STDERR = "stdin.fifo", "stdout", "stderr"


class _Server:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{HERE}"},
            text=True,
        )
        self.lock = threading.Lock()
        self.changed = threading.Condition()
        self.answers: list[int] = []
        self.ended: dict[int, int] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, line: str) -> int:
        """The answer to `start HARNESS CONFIG` is a pid, the one to `import MODULE` is 0."""
        assert self.process.stdin is not None
        with self.lock:
            before = len(self.answers)
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
            with self.changed:
                if not self.changed.wait_for(lambda: len(self.answers) > before, 60):
                    raise AssertionError("the server of warm processes did not answer")
            return self.answers[-1]

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            kind, pid, status = line.split()
            with self.changed:
                if kind == "answer":
                    self.answers.append(int(pid))
                else:
                    self.ended[int(pid)] = os.waitstatus_to_exitcode(int(status))
                self.changed.notify_all()


_server: _Server | None = None


def _running() -> _Server:
    global _server
    if _server is None or _server.process.poll() is not None:
        _server = _Server()
    return _server


def import_once(module: str) -> None:
    """Every process that is started from now on finds it imported."""
    _running().ask(f"import {module}")


class WarmProcess:
    """Runs the rank of `config`: `run_rank` of the module `harness`; its output lies beside the configuration."""

    stdin: IO[bytes]

    def __init__(self, config: Path, harness: str = "engine_harness") -> None:
        self._server = _running()
        fifo = config.parent / STDIN
        fifo.unlink(missing_ok=True)
        os.mkfifo(fifo)
        self.pid = self._server.ask(f"start {harness} {config}")
        self.stdin = fifo.open("wb", buffering=0)  # waits for the other side to read
        self.returncode: int | None = None

    def poll(self) -> int | None:
        self.returncode = self._server.ended.get(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        with self._server.changed:
            if not self._server.changed.wait_for(lambda: self.pid in self._server.ended, timeout):
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0.0)
        self.returncode = self._server.ended[self.pid]
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def main() -> None:
    import engine_harness  # noqa: F401  what every rank needs
    import torch

    import strategies.run_torch  # noqa: F401

    torch.set_num_threads(1)
    watched = selectors.DefaultSelector()
    watched.register(0, selectors.EVENT_READ, None)
    running: dict[int, int] = {}
    while True:
        for key, _ in watched.select():
            if key.data is not None:
                watched.unregister(key.fd)
                os.close(key.fd)
                pid, status = os.waitpid(key.data, 0)
                running.pop(pid)
                os.write(1, f"ended {pid} {status}\n".encode())
                continue
            line = sys.stdin.readline()
            if not line:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                return
            kind, _, argument = line.strip().partition(" ")
            if kind == "import":
                importlib.import_module(argument)
                os.write(1, b"answer 0 0\n")
                continue
            harness, _, path = argument.partition(" ")
            config = Path(path)
            gc.freeze()  # what is imported stays: a collection in a rank need not look at it, nor copy its pages
            pid = os.fork()
            if pid == 0:
                watched.close()
                _redirect(config.parent)
                importlib.import_module(harness).run_rank(config)
            running[pid] = os.pidfd_open(pid)
            watched.register(running[pid], selectors.EVENT_READ, pid)
            os.write(1, f"answer {pid} 0\n".encode())


def _redirect(folder: Path) -> None:
    for number, name in ((1, STDOUT), (2, STDERR)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(folder / STDIN, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  the server's buffer may hold other lines


if __name__ == "__main__":
    main()
