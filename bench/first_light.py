"""The figures that hive promises, measured: `python bench/first_light.py [--quick] [--only NAME] [--json FILE]`.

Progress goes to stderr, the table to stdout. Exit code 1 when a gate fails; a --quick run is a smoke test and judges
nothing. docs/benchmarks.md says what each benchmark does and how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script: what is imported lies beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import command_line, recovery, resources, startup, throughput
from bench.report import Finding, document, machine, table
from bench.stage import Stage

BENCHMARKS: dict[str, Callable[[Stage], Finding]] = {
    "help": command_line.help_time,
    "single_node": throughput.single_node,
    "data_parallel": throughput.data_parallel,
    "first_step": startup.first_step,
    "reform": recovery.reform,
    "idle_daemon": resources.idle_daemon,
    "heartbeats": resources.heartbeats,
    "store_kill": recovery.store,
}
ROUNDS = 7


def main() -> int:
    options = _options()
    rounds = options.rounds or (2 if options.quick else ROUNDS)
    findings: list[Finding] = []
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="hive-bench-", ignore_cleanup_errors=True))
        )
        stage = Stage(folder, stack, options.quick, rounds, options.threads, options.seed, options.workload)
        for name in options.only or BENCHMARKS:
            stage.tell(f"== {name}")
            started = time.monotonic()
            findings.append(replace(_measured(name, stage), seconds=time.monotonic() - started))
            if options.json is not None:  # after each, so that an interrupted run has left what it found
                content = document(findings, {key: value for key, value in vars(options).items() if key != "json"})
                options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(findings))
    print(f"\n{machine()}")
    if options.quick:
        print("a quick run: the figures mean nothing")
        return 0
    return 0 if all(finding.passed for finding in findings) else 1


def _measured(name: str, stage: Stage) -> Finding:
    """One benchmark; what it cannot measure is its own failure, and the others go on."""
    try:
        return BENCHMARKS[name](stage)
    except Exception as error:
        traceback.print_exc()
        return Finding(name, (), error=str(error).strip() or type(error).__name__)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few minutes")
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="may be given several times")
    parser.add_argument("--workload", choices=("digits", "text"), help="of the comparisons, only this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured")
    parser.add_argument("--rounds", type=int, help=f"of each comparison, {ROUNDS} by default")
    parser.add_argument("--threads", type=int, default=1, help="of each trainer, hive's and the peer's")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and of the moments of the kills")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
