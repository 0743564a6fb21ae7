"""Identifies every path below a folder and shows it as `hive models identify` does; writes what came of each as JSON.

A program of its own, so that the memory of its children is that of the readers alone, and its own that of who asks.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from pathlib import Path

from coordinator.cli import model_view
from coordinator.identify.confine import identify_path
from protos import documents
from protos.errors import HiveError

AT_ONCE = 2


async def outcome(path: Path, turns: asyncio.Semaphore) -> dict[str, object]:
    async with turns:
        started = time.monotonic()
        try:
            profile = await identify_path(path)
            found: dict[str, object] = {"format": profile.format, "trainable": profile.trainable}
            model_view.model({**documents.plain(profile), "source": path.name, "seen_by": "bytes"}, layers=20)
        except HiveError as error:
            found = {"code": error.code.value, "message": error.message, "hint": error.hint}
        return {"name": path.name, "seconds": time.monotonic() - started, **found}


def most_bytes() -> int:
    """The most memory that this program had until now. What getrusage says of it may be what started it had."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


async def main(folder: Path) -> None:
    turns = asyncio.Semaphore(AT_ONCE)
    before_bytes = most_bytes()
    outcomes = await asyncio.gather(*(outcome(path, turns) for path in sorted(folder.iterdir())))
    child_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    grown_bytes = most_bytes() - before_bytes
    sys.stdout.write(json.dumps({"outcomes": outcomes, "child_bytes": child_bytes, "grown_bytes": grown_bytes}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
