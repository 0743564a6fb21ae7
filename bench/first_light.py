"""The figures that hive promises, measured: `python bench/first_light.py [--quick] [--only NAME] [--json FILE]`.

Progress goes to stderr, the table to stdout. Exit code 1 when a gate fails; a --quick run is a smoke test and judges
nothing. docs/benchmarks.md says what each benchmark does and how to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script: what is imported lies beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import command_line, recovery, resources, startup, throughput
from bench.report import Finding
from bench.runner import options, perform
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


def main() -> int:
    parser = options(__doc__.splitlines()[0] if __doc__ else "", BENCHMARKS)
    parser.add_argument("--workload", choices=("digits", "text"), help="of the comparisons, only this one")
    chosen = parser.parse_args()
    return perform(BENCHMARKS, chosen, chosen.workload)


if __name__ == "__main__":
    sys.exit(main())
