"""Kill -9 of the store during commits: does anything acknowledged get lost?

A child process commits numbered events, many at a time, and prints each number once its commit was acknowledged. It is
killed at a random moment; then the database is opened again and checked: every printed number is there, the hash chain
holds, SQLite's own integrity check passes. The same database is used for all rounds.

    python bench/store_kill.py [ROUNDS]
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from coordinator.store.protocol import AppendEvent, SetMeta
from coordinator.store.sqlite import DATABASE, SqliteStore

AT_ONCE = 16
START_DEADLINE_S = 60.0
REPOSITORY = Path(__file__).resolve().parent.parent


async def write_numbers(folder: Path, first: int) -> None:
    """The child: commit first, first + 1, ... until killed; acknowledged numbers go to stdout."""
    store = await SqliteStore.open(folder)
    numbers = iter(range(first, sys.maxsize))

    async def writer() -> None:
        for number in numbers:
            await store.commit(AppendEvent("number", payload={"number": number}), SetMeta(f"number/{number % 64}", "x"))
            os.write(1, f"{number}\n".encode())

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(writer())


async def stored_numbers(folder: Path) -> set[int]:
    """What a coordinator finds after the crash; raises RuntimeError when the log was damaged."""
    store = await SqliteStore.open(folder)
    try:
        check = await store.verify_chain()
        if check.broken_at is not None:
            raise RuntimeError(check.message)
        found: set[int] = set()
        after_seq = 0
        while events := await store.events(after_seq, kinds=["number"], limit=10_000):
            found.update(json.loads(event.payload_json)["number"] for event in events)
            after_seq = events[-1].seq
        return found
    finally:
        await store.close()


def one_round(folder: Path, first: int, rng: random.Random) -> list[int]:
    """Start a child, kill it up to a fifth of a second after its first acknowledgement; what it acknowledged."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, __file__, "--child", str(folder), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout is not None
        watchdog = threading.Timer(START_DEADLINE_S, child.kill)
        watchdog.start()
        try:
            acknowledged = [int(child.stdout.readline())]
            killer = threading.Timer(rng.uniform(0.0, 0.2), child.send_signal, [signal.SIGKILL])
            killer.start()
            acknowledged += [int(line) for line in child.stdout if line.endswith("\n")]
            killer.join()
        finally:
            watchdog.cancel()
            with contextlib.suppress(ProcessLookupError):
                child.kill()
    return acknowledged


def run(rounds: int = 50, seed: int = 0) -> dict[str, float]:
    """Rounds of writing and killing on one database; `lost` and `damaged` are what must be 0."""
    rng = random.Random(seed)
    started_s = time.monotonic()
    acknowledged: set[int] = set()
    lost = damaged = 0
    with tempfile.TemporaryDirectory(prefix="hive-store-kill-") as name:
        folder = Path(name)
        for number in range(rounds):
            acknowledged.update(one_round(folder, number * 1_000_000, rng))
            found = asyncio.run(stored_numbers(folder))
            lost += len(acknowledged - found)
            with contextlib.closing(sqlite3.connect(folder / DATABASE)) as connection:
                damaged += connection.execute("PRAGMA integrity_check").fetchone() != ("ok",)
    return {
        "rounds": rounds,
        "acknowledged": len(acknowledged),
        "stored": len(found) if rounds else 0,
        "lost": lost,
        "damaged": damaged,
        "seconds": round(time.monotonic() - started_s, 1),
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        asyncio.run(write_numbers(Path(sys.argv[2]), int(sys.argv[3])))
        return
    result = run(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
    for key, value in result.items():
        print(f"{key:<14}{value:>10}")
    raise SystemExit(1 if result["lost"] or result["damaged"] else 0)


if __name__ == "__main__":
    main()
