"""A cluster whose processes run on the machines of a LAN of namespaces; the CLI runs on the coordinator's machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.cluster import CALIBRATION, Cluster, Process
from tests.netns.machines import Lan, Machine


@dataclass
class LanCluster(Cluster):
    lan: Lan = field(default_factory=lambda: Lan(""))
    host: str = "0.0.0.0"

    def coordinator_on(self, machine: Machine, *flags: str) -> None:
        self._prefix = machine.prefix
        self.start_coordinator(*(flags or ("--advertise",)), prefix=machine.prefix)

    def node_on(self, machine: Machine, name: str, *flags: str) -> Process:
        return self.start_node(name, 1, "2GiB", *(flags or ("--no-advertise",)), prefix=machine.prefix)

    def machine_on(self, machine: Machine, name: str, *flags: str) -> Process:
        """`hive-node start` with exactly these flags, beside what a test needs."""
        home = self.folder / name
        if self.calibration is not None and self.calibration.exists() and not (home / CALIBRATION).exists():
            shutil.copytree(self.calibration, home / CALIBRATION)
        home.mkdir(parents=True, exist_ok=True)
        arguments = ["node.cli", "start", "--name", name, "--cpus", "1", "--memory", "2GiB", "--allow-root", *flags]
        node = Process(name, home, arguments, self.environment(home), machine.prefix)
        self.nodes[name] = node
        node.start()
        return node

    def hive(self, *arguments: str, check: bool = True, deadline_s: float = 180.0) -> subprocess.CompletedProcess[str]:
        return self.run_on(self._prefix, ["coordinator.cli.main", *arguments], self.home, check, deadline_s)

    def run_on(
        self, prefix: list[str], module: list[str], home: Path, check: bool, deadline_s: float
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*prefix, sys.executable, "-m", *module],
            env=self.environment(home),
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(module)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done
