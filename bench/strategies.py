"""What the strategies are worth: `python -m bench.strategies [--only PART] [--pairs N] [--quick] [--json FILE]`.

Progress goes to stderr, the table to stdout. Exit code 1 when a gate fails; a --quick run is a smoke test and judges
nothing. docs/benchmarks.md says what each part does and how to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script: what is imported lies beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import strategy_netns, strategy_peers, strategy_predict, strategy_uneven
from bench.report import Finding
from bench.runner import options, perform
from bench.stage import Stage

BENCHMARKS: dict[str, Callable[[Stage], Finding]] = {
    "peers": strategy_peers.peers,
    "uneven": strategy_uneven.uneven,
    "predict": strategy_predict.predict,
    "netns": strategy_netns.networks,
}


def main() -> int:
    return perform(BENCHMARKS, options(__doc__.splitlines()[0] if __doc__ else "", BENCHMARKS, "--pairs").parse_args())


if __name__ == "__main__":
    sys.exit(main())
