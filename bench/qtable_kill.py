"""Kill -9 of a coordinator's learner while it saves: is anything ever lost?

A real process commits outcomes, decisions, imports and resets to a real database, and after each one catches up and
saves its snapshot, as a coordinator does; it says the event's number once the save has returned. It is killed at a
random moment. Then: a snapshot loads; it is not older than the last save that returned; it is what the log gives up to
there; and a learner that starts from it ends up where the whole log leads. The same folder is used for all rounds.
Kills between two saves prove little: a full run in which too few were inside one has failed, too.

    python -m bench.qtable_kill [ROUNDS]
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from coordinator import qtable_events, qtable_replay
from coordinator.learning import DECISION, OUTCOME, Learner
from coordinator.store.protocol import AppendEvent
from coordinator.store.sqlite import SqliteStore
from qtable import snapshot
from qtable.prior import load_prior
from qtable.state import ACTIONS, SHAPE, StateKey
from strategies.cost import COST_MODEL_VERSION

ORIGIN = "here"
START_DEADLINE_S = 60.0
LATEST_KILL_S = 0.2  # after the first save: some ten saves
FULL_ROUNDS, LEAST_INSIDE = 200, 20  # of a full run, and how many of its kills must have left a save half done


def some_event(rng: random.Random) -> AppendEvent:
    """Mostly outcomes; now and then what a person does to the table."""
    key = StateKey(*(rng.randrange(size) for size in SHAPE[:4]))
    match rng.randrange(20):
        case 0:
            return AppendEvent(qtable_events.RESET, payload={"by": "me"})
        case 1:
            table = load_prior().table(f"there-{rng.randrange(3)}")
            table.learn(key, rng.choice(ACTIONS), rng.uniform(-2, 2))
            table.last_seq = rng.randrange(1, 1000)
            payload = qtable_events.table_import(table.contributions(), table.cost_model_version, "x.json", "me")
            return AppendEvent(qtable_events.IMPORT, payload=payload)
        case 2:
            ranks: list[int | None] = [0, 1, None, None, 2]
            rng.shuffle(ranks)
            payload = qtable_events.ranks_import({rng.randrange(144): ranks}, "q.pkl", "me")
            return AppendEvent(qtable_events.IMPORT, payload=payload)
        case 3:
            return AppendEvent(DECISION, payload={"explored": True, "expected_loss_s": rng.random()})
        case _:
            measured_s = 10.0 * rng.uniform(0.3, 3.0)
            payload = {
                "strategy": rng.choice(ACTIONS), "state": list(key), "predicted_s": 10.0, "measured_s": measured_s,
                "ran_s": measured_s, "counted": True, "cost_model_version": COST_MODEL_VERSION,
            }  # fmt: skip
            return AppendEvent(OUTCOME, payload=payload)


async def learn_and_save(folder: Path, seed: int, said: Connection) -> None:
    """The child: until killed. Each number goes out after the save that holds it has returned."""
    rng = random.Random(seed)
    store = await SqliteStore.open(folder)
    learner = Learner(folder / "qtable.json", origin=ORIGIN)
    await learner.catch_up(store)
    while True:
        await store.commit(some_event(rng))
        await learner.catch_up(store)
        if learner.problem:
            raise RuntimeError(learner.problem)
        said.send(learner.table.last_seq)


def child(folder: Path, seed: int, said: Connection) -> None:
    asyncio.run(learn_and_save(folder, seed, said))


def one_round(folder: Path, seed: int, rng: random.Random) -> int:
    """Start a child, kill it at a random moment after its first save; the last number it said."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(folder, seed, theirs), daemon=True)
    process.start()
    theirs.close()
    assert process.pid is not None
    try:
        if not ours.poll(START_DEADLINE_S):
            raise RuntimeError("the process that saves did not start")
        last = int(ours.recv())
        killer = threading.Timer(rng.uniform(0.0, LATEST_KILL_S), os.kill, [process.pid, signal.SIGKILL])
        killer.start()
        try:
            while True:
                last = int(ours.recv())
        except (EOFError, OSError):
            pass
        killer.join()
    finally:
        process.kill()
        process.join()
        ours.close()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the process that saves ended by itself: {process.exitcode}")
    return last


async def wrong_after(folder: Path, last: int) -> list[str]:
    """What a coordinator that starts now would find wrong; nothing, if all is well."""
    loaded = snapshot.load(folder / "qtable.json")
    if loaded.table is None:
        return [f"lost: {loaded.reason}"]
    wrong = [] if loaded.table.last_seq >= last else [f"lost: {loaded.table.last_seq} is older than {last}"]
    store = await SqliteStore.open(folder)
    try:
        blank = Learner(folder / "none" / "qtable.json", origin=ORIGIN)
        upto, _ = await qtable_replay.replay(blank, store, loaded.table.last_seq)
        if snapshot.document(upto.table, upto.ledger) != snapshot.document(loaded.table, loaded.ledger):
            wrong.append(f"differs: the log up to {loaded.table.last_seq} gives another table")
        learner = Learner(folder / "qtable.json", origin=ORIGIN)
        await learner.catch_up(store)
        whole, _ = await qtable_replay.replay(blank, store, store.last_seq)
        if snapshot.document(whole.table, whole.ledger) != snapshot.document(learner.table, learner.ledger):
            wrong.append("differs: going on from the snapshot leads elsewhere than the whole log")
    finally:
        await store.close()
    return wrong


def run(rounds: int = FULL_ROUNDS, seed: int = 0) -> dict[str, float]:
    """`lost` and `differing` are what must be 0; `in a save` are kills that left a save half done."""
    multiprocessing.set_forkserver_preload(["coordinator.qtable_replay", "coordinator.store.sqlite"])
    rng = random.Random(seed)
    started_s = time.monotonic()
    lost = differing = inside = last = 0
    with tempfile.TemporaryDirectory(prefix="hive-qtable-kill-") as name:
        folder = Path(name)
        for number in range(rounds):
            last = one_round(folder, seed * 1_000_000 + number, rng)
            inside += (folder / "qtable.json.tmp").exists() or not (folder / "qtable.json").exists()
            wrong = asyncio.run(wrong_after(folder, last))
            lost += any(each.startswith("lost") for each in wrong)
            differing += any(each.startswith("differs") for each in wrong)
            for each in wrong:
                print(f"round {number}: {each}")
    return {
        "rounds": rounds,
        "events": last,
        "in a save": inside,
        "lost": lost,
        "differing": differing,
        "seconds": round(time.monotonic() - started_s, 1),
    }


def failures(result: Mapping[str, float]) -> list[str]:
    """Why a run proves nothing, or proves the opposite; empty when all is well."""
    found = [f"{result[what]:g} {what}" for what in ("lost", "differing") if result[what]]
    if result["rounds"] >= FULL_ROUNDS and result["in a save"] < LEAST_INSIDE:
        found.append(f"only {result['in a save']:g} kills were inside a save, {LEAST_INSIDE} are needed")
    return found


def main() -> None:
    result = run(int(sys.argv[1]) if len(sys.argv) > 1 else FULL_ROUNDS)
    for key, value in result.items():
        print(f"{key:<14}{value:>10}")
    found = failures(result)
    for each in found:
        print(f"failed: {each}")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
