"""What a benchmark is given: options, a folder of its own, and one cluster that is started when first asked for."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench.cluster import running
from tests.e2e.cluster import Cluster


@dataclass(slots=True)
class Stage:
    """`rounds`: of each comparison. `quick` is a smoke run: fewer and shorter, its figures mean nothing."""

    folder: Path
    stack: ExitStack
    quick: bool
    rounds: int
    threads: int
    seed: int = 0
    workload: str | None = None  # only this one, by its data
    _cluster: Cluster | None = field(default=None)

    def cluster(self) -> Cluster:
        """Two idle nodes, shared by the benchmarks that train."""
        if self._cluster is None:
            self.tell("starting a coordinator and two nodes")
            self._cluster = self.stack.enter_context(running(self.folder / "cluster", threads=self.threads))
        return self._cluster

    def subfolder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def either(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def tell(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
