"""The hash chain of the event log: each event carries a hash over the one before it and itself.

A changed, removed, inserted or reordered row makes every later hash wrong; `head` (kept beside the log in the same
transaction) shows rows cut off the end. It finds damage and clumsy edits; whoever can rewrite the whole database can
also rewrite the chain.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import blake3

from coordinator.records import Event
from coordinator.store.protocol import ChainCheck

GENESIS = ""


@dataclass(frozen=True, slots=True)
class Head:
    """The newest event: what the next one is chained to."""

    seq: int = 0
    chain: str = GENESIS


def link(previous: str, event: Event) -> str:
    """The chain value of an event after `previous`. Every field is length-prefixed, so no two events hash alike."""
    hasher = blake3.blake3()
    parts = (
        previous,
        str(event.seq),
        event.time_s.hex(),
        event.kind,
        "-" if event.job_id is None else f"={event.job_id}",
        "-" if event.node_id is None else f"={event.node_id}",
    )
    for part in (*(part.encode() for part in parts), event.payload_json):
        hasher.update(len(part).to_bytes(8, "big"))
        hasher.update(part)
    return hasher.hexdigest()


def chained(head: Head, event: Event) -> tuple[Event, Head]:
    """The event as the next of the log, and the new head."""
    numbered = replace(event, seq=head.seq + 1)
    complete = replace(numbered, chain=link(head.chain, numbered))
    return complete, Head(complete.seq, complete.chain)


def verify(events: Iterable[Event], head: Head) -> ChainCheck:
    """Check a whole log, read in order, against its recorded head."""
    at = Head()
    for event in events:
        if event.seq != at.seq + 1:
            return ChainCheck(at.seq, at.seq + 1, f"event {at.seq + 1} is missing, {event.seq} follows {at.seq}")
        if link(at.chain, event) != event.chain:
            return ChainCheck(at.seq, event.seq, f"event {event.seq} is not what was written")
        at = Head(event.seq, event.chain)
    if at != head:
        broken = min(at.seq, head.seq) + 1
        return ChainCheck(at.seq, broken, f"the log ends at event {at.seq}, {head.seq} were written")
    return ChainCheck(at.seq, None, f"{at.seq} events, all as written")
