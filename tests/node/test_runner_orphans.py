"""A daemon that is killed leaves nothing behind: a real daemon process, a real kill -9."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from node_bench import wait_until_gone

from node import process_tree

DAEMON = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from node_bench import Bench
from node.limits import Caps
from node.cpu_limit import DutyLimit, NoLimit
from node.runner import Runner

async def main():
    folder = Path(sys.argv[1])
    limit = DutyLimit(0.05, "") if sys.argv[3] == "duty" else NoLimit("")
    bench = Bench(Runner(Caps(), folder, limit, entry="worker_entries:run"), folder)
    handle, recorder = await bench.start("starts_processes")
    line = await recorder.line("pids")
    sys.stdout.write(f"{bench.runner.warm_pid} {line.removeprefix('pids ')}\\n")
    sys.stdout.flush()
    await handle.wait()

asyncio.run(main())
"""


def _kill_and_see(tmp_path: Path, limit: str) -> list[int]:
    here = str(Path(__file__).parent)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(here).parent.parent), here]))
    command = [sys.executable, "-c", DAEMON, str(tmp_path), here, limit]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as daemon:
        assert daemon.stdout is not None
        assert select.select([daemon.stdout], [], [], 30)[0], "the daemon did not start a worker"
        pids = [int(pid) for pid in daemon.stdout.readline().split()]
        assert len(pids) == 4 and wait_until_gone(pids, 0.0) == pids
        daemon.kill()
        left = wait_until_gone(pids, 5.0)
        process_tree.send_signal(left, signal.SIGKILL)
        return left


def test_after_kill_9_of_the_daemon_no_process_is_left(tmp_path: Path) -> None:
    assert _kill_and_see(tmp_path, "none") == []


def test_nor_when_the_workers_were_stopped_by_the_duty_cycle(tmp_path: Path) -> None:
    assert _kill_and_see(tmp_path, "duty") == []
