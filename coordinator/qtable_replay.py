"""The log read again, beside the learner that is in use: to compare with it, and to measure what learning was worth.

Pages are applied in a thread, on a learner of its own, so that the control loop keeps its turns. Refuses to change what
is in use: who asks decides with the answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.learning import KINDS, Learner
from coordinator.records import Event
from coordinator.store.protocol import Store
from qtable import snapshot

_PAGE = 1000

Watch = Callable[[Event, Mapping[str, Any], Learner], None]  # before the event is applied


@dataclass(frozen=True, slots=True)
class Comparison:
    """`differs` names the fields of the snapshot, and "speeds", that are not the same; empty when all are."""

    events: int
    last_seq: int
    differs: tuple[str, ...]


async def replay(
    learner: Learner, store: Store, upto_seq: int, watch: Watch = lambda event, payload, made: None
) -> tuple[Learner, int]:
    """A learner that has seen the log up to an event, and how many events it read."""
    made, read, after_seq = learner.blank(), 0, 0
    while page := [event for event in await store.events(after_seq, None, KINDS, _PAGE) if event.seq <= upto_seq]:
        await asyncio.to_thread(_applied, made, page, watch)
        read, after_seq = read + len(page), page[-1].seq
    return made, read


def _applied(made: Learner, page: Sequence[Event], watch: Watch) -> None:
    for event in page:
        payload = json.loads(event.payload_json)
        watch(event, payload, made)
        made.apply_speed(event.seq, event.kind, payload)
        made.apply(event.seq, event.kind, payload)


async def rebuild(learner: Learner, store: Store) -> Comparison:
    """Read the log from its beginning, compare with what is in use, and go on with what the log says. What is
    appended meanwhile is not compared, and is in what the learner goes on with."""
    while await learner.catch_up(store):
        pass  # until table and speeds have seen the same events
    upto_seq = learner.table.last_seq
    in_use = snapshot.document(learner.table, learner.ledger)
    speeds = learner.speeds.learned()
    made, read = await replay(learner, store, upto_seq)
    again = snapshot.document(made.table, made.ledger)
    differs = tuple(name for name in again if name != "sha256" and again[name] != in_use[name])
    if made.speeds.learned() != speeds:
        differs = (*differs, "speeds")
    await learner.adopt(made, store)
    return Comparison(read, upto_seq, differs)
