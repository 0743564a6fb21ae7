"""A cluster whose processes run on the machines of a LAN of namespaces; the CLI runs on the coordinator's machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.cluster import CALIBRATION, Cluster, Process
from tests.netns.machines import Lan, Machine


@dataclass
class LanCluster(Cluster):
    lan: Lan = field(default_factory=lambda: Lan(""))
    host: str = "0.0.0.0"
    prefix: list[str] = field(default_factory=list)  # of the machine where the CLI runs

    def coordinator_on(self, machine: Machine, *flags: str) -> None:
        self.prefix = machine.prefix
        self.start_coordinator(*(flags or ("--advertise",)), prefix=machine.prefix)

    def node_on(self, machine: Machine, name: str, *flags: str) -> Process:
        """With the token and the coordinator's address."""
        return self.start_node(name, 1, "2GiB", *("--no-advertise", *flags), prefix=machine.prefix)

    def machine_on(self, machine: Machine, name: str, *flags: str) -> Process:
        """`hive-node start` with exactly these flags beside its caps: neither a token nor an address."""
        home = self.folder / name
        if self.calibration is not None and self.calibration.exists() and not (home / CALIBRATION).exists():
            shutil.copytree(self.calibration, home / CALIBRATION)
        home.mkdir(parents=True, exist_ok=True)
        arguments = ["node.cli", "start", "--name", name, "--cpus", "1", "--memory", "2GiB", "--allow-root", *flags]
        node = Process(name, home, arguments, self.environment(home), machine.prefix)
        self.nodes[name] = node
        node.start()
        return node

    def show_nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("nodes")["nodes"]  # the test itself is not on the LAN
        return found

    def show(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = self.ask("show", job_id)["job"]
        return job

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], check: bool = True, deadline_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.prefix, sys.executable, "-m", *command],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done
