"""Runs a set of benchmarks one after the other: progress to stderr, the table to stdout, everything to a JSON file.

What cannot be measured is that benchmark's own failure, and the others go on. Exit code 1 when a gate fails; a quick
run is a smoke test and judges nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bench.report import Finding, document, machine, table
from bench.stage import Stage

ROUNDS = 7
QUICK_ROUNDS = 2
Benchmarks = Mapping[str, Callable[[Stage], Finding]]


def options(description: str, benchmarks: Benchmarks, rounds: str = "--rounds") -> argparse.ArgumentParser:
    """What every set of benchmarks takes; `rounds` is how this one calls them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few minutes")
    parser.add_argument("--only", action="append", choices=list(benchmarks), help="may be given several times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured")
    parser.add_argument(rounds, dest="rounds", type=int, help=f"of each comparison, {ROUNDS} by default")
    parser.add_argument("--threads", type=int, default=1, help="of each trainer, hive's and the peer's")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random")
    return parser


def perform(benchmarks: Benchmarks, chosen: argparse.Namespace, workload: str | None = None) -> int:
    rounds = chosen.rounds or (QUICK_ROUNDS if chosen.quick else ROUNDS)
    findings: list[Finding] = []
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="hive-bench-", ignore_cleanup_errors=True))
        )
        stage = Stage(folder, stack, chosen.quick, rounds, chosen.threads, chosen.seed, workload)
        for name in chosen.only or benchmarks:
            stage.tell(f"== {name}")
            started = time.monotonic()
            findings.append(replace(_measured(benchmarks, name, stage), seconds=time.monotonic() - started))
            if chosen.json is not None:  # after each, so that an interrupted run has left what it found
                content = document(findings, {key: value for key, value in vars(chosen).items() if key != "json"})
                chosen.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(findings))
    print(f"\n{machine()}")
    if chosen.quick:
        print("a quick run: the figures mean nothing")
        return 0
    return 0 if all(finding.passed for finding in findings) else 1


def _measured(benchmarks: Benchmarks, name: str, stage: Stage) -> Finding:
    try:
        return benchmarks[name](stage)
    except Exception as error:
        traceback.print_exc()
        return Finding(name, (), error=str(error).strip() or type(error).__name__)
