"""A table from the log of what happened: each outcome is applied once, in the order of its seq.

The log is the source of truth. Outcomes predicted by another version of the cost model are passed over: what corrected
an old formula says nothing about a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qtable.reward import reward
from qtable.state import SHAPE, StateKey
from qtable.table import QTable


@dataclass(frozen=True, slots=True)
class OutcomeRecord:
    """One finished job: where it was, what was done, and how long that was thought to take and took."""

    seq: int
    key: StateKey
    action: str
    predicted_s: float
    measured_s: float
    cost_model_version: int


def key_of(state: Sequence[int]) -> StateKey:
    """The cell that an event names. Raises ValueError when there is no such cell, TypeError when it is none at all."""
    key = StateKey(*(int(part) for part in state))
    if any(not 0 <= part < size for part, size in zip(key, SHAPE, strict=False)):
        raise ValueError(f"no such cell: {key}")
    return key


def apply(table: QTable, record: OutcomeRecord) -> bool:
    """True when it taught the table something; False when it was applied before or is of another cost model."""
    if record.seq <= table.last_seq:
        return False
    counts = record.cost_model_version == table.cost_model_version
    if counts:
        table.learn(record.key, record.action, reward(record.predicted_s, record.measured_s))
    table.last_seq = record.seq
    return counts


def replay(table: QTable, records: Iterable[OutcomeRecord]) -> int:
    """Apply the records to `table`; the number that counted."""
    return sum(apply(table, record) for record in records)
