"""The table on disk: one JSON document, written atomically, three generations kept. Never pickle.

A snapshot only spares a replay of the log: losing it loses nothing. A document is taken only when its digest, bins,
actions, shapes and numbers are right; otherwise the next older generation is tried, and the reason is told.
Q, n, mean and M2 are what the contributions give put together, and are checked against them. The same document is what
another coordinator imports. Invariant: a kill at any moment leaves at least one valid generation once one was written.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qtable.contribution import Contribution
from qtable.policy import Ledger
from qtable.state import ACTIONS, BINS, SHAPE
from qtable.table import ARRAYS, QTable

SCHEMA = "hive/qtable/v1"
GENERATIONS = 3
MAX_BYTES = 4 * 1024 * 1024
_NAMES = {"q": "Q", "q0": "Q0", "n": "n", "mean": "mean", "m2": "M2"}


@dataclass(frozen=True, slots=True)
class Loaded:
    """`table` None: nothing usable was found. `reason` says what was taken, and what was passed over and why."""

    table: QTable | None
    ledger: Ledger
    path: Path | None
    reason: str


def document(table: QTable, ledger: Ledger) -> dict[str, Any]:
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "bins": {name: list(edges) for name, edges in BINS.items()},
        "actions": list(ACTIONS),
        "shape": list(SHAPE),
        "cost_model_version": table.cost_model_version,
        "last_event_seq": table.last_seq,
        "ledger": {"job_s": ledger.job_s, "loss_s": ledger.loss_s},
        "origin": table.origin,
        "contributions": {origin: {"seq": part.seq, **part.cells()} for origin, part in table.contributions().items()},
    }
    body |= {_NAMES[name]: getattr(table, name).ravel().tolist() for name in ARRAYS}
    return body | {"sha256": checksum(body)}


def checksum(body: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of everything but the checksum."""
    canonical = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse(text: str | bytes) -> tuple[QTable, Ledger]:
    """Raises ValueError with the first thing that is wrong."""
    try:
        body = json.loads(text, parse_constant=_refuse)
        if not isinstance(body, dict) or body.get("schema") != SCHEMA:
            raise ValueError(f"not a document of schema {SCHEMA}")
        if body.get("sha256") != checksum(body):
            raise ValueError("its checksum does not match: damaged")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    bins = {name: list(edges) for name, edges in BINS.items()}
    if (body.get("bins"), body.get("actions"), body.get("shape")) != (bins, list(ACTIONS), list(SHAPE)):
        raise ValueError("it was written with other bins or actions")
    try:
        arrays = {name: np.array(body[_NAMES[name]], dtype=np.float64).reshape(SHAPE) for name in ARRAYS}
        version, last_seq = int(body["cost_model_version"]), int(body["last_event_seq"])
        parts = {
            str(origin): Contribution.of_cells(int(part["seq"]), part)
            for origin, part in dict(body["contributions"]).items()
        }
        table = QTable(arrays["q0"], version, last_seq, str(body["origin"]), parts)
        ledger = Ledger(float(body["ledger"]["job_s"]), float(body["ledger"]["loss_s"]))
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"a field is missing or of the wrong type: {error}") from None
    for name in ARRAYS:
        if not np.array_equal(getattr(table, name), arrays[name]):
            raise ValueError(f"{_NAMES[name]} is not what its contributions add up to")
    return table, ledger


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number a table may hold")


def save(path: Path, table: QTable, ledger: Ledger) -> None:
    """Write, fsync, move the older generations down, put the new one in place, fsync the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(document(table, ledger), file, separators=(",", ":"), allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    generations = _generations(path)
    for newer, older in reversed(list(pairwise(generations))):
        if newer.exists():
            newer.replace(older)
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path) -> Loaded:
    """The valid generation with the highest event seq. Never raises for what a file holds."""
    best: tuple[QTable, Ledger, Path] | None = None
    passed_over: list[str] = []
    for generation in _generations(path):
        try:
            if not generation.exists():
                continue
            if generation.stat().st_size > MAX_BYTES:
                raise ValueError(f"over {MAX_BYTES} bytes")
            table, ledger = parse(generation.read_bytes())
        except (OSError, ValueError) as error:
            passed_over.append(f"{generation.name}: {error}")
            continue
        if best is None or table.last_seq > best[0].last_seq:
            best = (table, ledger, generation)
    also = f"; passed over {'; '.join(passed_over)}" if passed_over else ""
    if best is None and not passed_over:
        return Loaded(None, Ledger(), None, "no snapshot yet: nothing learned, unless the log says so")
    if best is None:
        return Loaded(None, Ledger(), None, f"no usable snapshot at {path}{also}")
    return Loaded(best[0], best[1], best[2], f"{best[2].name} at event {best[0].last_seq}{also}")


def _generations(path: Path) -> tuple[Path, ...]:
    return (path, *(path.with_name(f"{path.name}.{age}") for age in range(1, GENERATIONS)))
