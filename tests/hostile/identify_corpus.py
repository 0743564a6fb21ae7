"""Identifies every path below a folder and shows it as `hive models identify` does; writes what came of each as JSON.

A program of its own, so that the memory of its children is that of the readers alone.
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


async def main(folder: Path) -> None:
    turns = asyncio.Semaphore(AT_ONCE)
    outcomes = await asyncio.gather(*(outcome(path, turns) for path in sorted(folder.iterdir())))
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    sys.stdout.write(json.dumps({"outcomes": outcomes, "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
