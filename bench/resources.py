"""What the daemons cost while nobody trains: one idle node, and a coordinator with 200 nodes that say they are alive.

CPU is the processes' own user and system time over the wall time of the window, in percent of one core.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.cluster import MEMORY, running
from bench.report import Bound, Figure, Finding, Gate
from bench.stage import Stage
from tests.e2e.cluster import Cluster, until

MIB = 1024 * 1024
DAEMON_RSS = Gate(Bound.BELOW, 80.0)
DAEMON_CPU = Gate(Bound.BELOW, 0.5)
CLIENT = Path(__file__).resolve().parent / "simulated_nodes.py"
SETTLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Used:
    cpu_percent: float
    rss_mib: float


def used_by(pid: int, seconds: float) -> Used:
    """Over a window that begins now; memory is the largest of once a second."""
    process = psutil.Process(pid)
    began, before = time.monotonic(), process.cpu_times()
    largest = 0
    while (left := began + seconds - time.monotonic()) > 0:
        largest = max(largest, process.memory_info().rss)
        time.sleep(min(1.0, left))
    after, elapsed = process.cpu_times(), time.monotonic() - began
    busy = (after.user + after.system) - (before.user + before.system)
    return Used(100 * busy / elapsed, largest / MIB)


def idle_daemon(stage: Stage) -> Finding:
    """Measured after a restart under the same caps: its speed comes from the cache, so no worker was ever started."""
    window_s = stage.either(60, 5)
    with running(stage.subfolder("idle"), ("n0",), stage.threads) as cluster:
        cluster.nodes["n0"].end()
        until(lambda: cluster.show_nodes()[0]["link"] != "CONNECTED", "the node has left")
        node = cluster.start_node("n0", stage.threads, MEMORY)
        cluster.wait_ready(1)
        time.sleep(stage.either(20, 3))  # the first bandwidth probe and refresh are over
        stage.tell(f"watching an idle node for {window_s} s")
        used = used_by(node.pid, window_s)
        children = len(psutil.Process(node.pid).children())
    figures = (
        Figure("node daemon: memory", used.rss_mib, "MiB", gate=DAEMON_RSS, note="RSS, largest"),
        Figure("node daemon: CPU", used.cpu_percent, "%", gate=DAEMON_CPU, note=f"of one core over {window_s} s"),
        Figure("node daemon: child processes", children),
    )
    return Finding("idle_daemon", figures)


def heartbeats(stage: Stage) -> Finding:
    """Sessions are real: mutual TLS, an enrolled credential each, and a heartbeat as often as the coordinator asks."""
    nodes, window_s = stage.either(200, 20), stage.either(60, 5)
    with running(stage.subfolder("heartbeats"), ()) as cluster:
        assert cluster.coordinator is not None  # it was just started
        alone = used_by(cluster.coordinator.pid, SETTLE_S)
        token = cluster.ask("token", "create", "--role", "node", "--uses", "0")["token"]["token"]
        command = [sys.executable, str(CLIENT), cluster.address, token, str(nodes)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=cluster.environment(cluster.home)) as client:
            try:
                connected_s = _connected(cluster, nodes, client)
                time.sleep(SETTLE_S)
                stage.tell(f"{nodes} nodes are connected; watching the coordinator for {window_s} s")
                used = used_by(cluster.coordinator.pid, window_s)
                still = _count(cluster)
            finally:
                client.terminate()
                client.wait(20)
    figures = (
        Figure("nodes that heartbeat", still, gate=Gate(Bound.EXACTLY, nodes), note=f"after {window_s} s"),
        Figure("coordinator: CPU", used.cpu_percent, "%", note=f"of one core; {alone.cpu_percent:.1f} % without nodes"),
        Figure("coordinator: memory", used.rss_mib, "MiB", note=f"RSS, largest; {alone.rss_mib:.0f} without nodes"),
        Figure("until all are connected", connected_s, "s", note="enrolment included"),
    )
    return Finding("heartbeats", figures)


def _connected(cluster: Cluster, nodes: int, client: subprocess.Popen[bytes]) -> float:
    began = time.monotonic()

    def all_here() -> bool:
        if client.poll() is not None:
            raise AssertionError(f"the simulated nodes ended: {client.returncode}")
        return _count(cluster) >= nodes

    until(all_here, f"{nodes} nodes are connected", 180.0)
    return time.monotonic() - began


def _count(cluster: Cluster) -> int:
    return sum(node["link"] == "CONNECTED" for node in cluster.show_nodes())
