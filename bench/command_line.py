"""How long a person waits for `hive --help`: the installed program, a process of its own each time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.paired import percentile
from bench.report import Bound, Figure, Finding, Gate
from bench.stage import Stage

GATE = Gate(Bound.BELOW, 150.0)


def help_time(stage: Stage) -> Finding:
    program = shutil.which("hive", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        raise FileNotFoundError("hive is not installed in this environment: pip install -e .")
    milliseconds = [_once([program, "--help"]) for _ in range(stage.either(31, 5))][1:]
    low, high = percentile(milliseconds, 0.05), percentile(milliseconds, 0.95)
    note = f"p50 of {len(milliseconds)}, p5 .. p95"
    figure = Figure("hive --help", percentile(milliseconds, 0.5), "ms", low, high, GATE, note)
    return Finding("help", (figure,), {"milliseconds": milliseconds})


def _once(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=30)
    return 1e3 * (time.perf_counter() - started)
