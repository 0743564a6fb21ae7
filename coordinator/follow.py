"""Streams that outlive the coordinator: event and log followers that reconnect and continue where they were.

Owns: back-off with jitter, the position to resume from, and that nothing is lost or repeated across a restart. Refuses
to hide what a retry cannot mend (access, not found): those end the stream. Pure but for the stream it is given and the
pause between two tries, which are passed in.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from protos.errors import TABLE, HiveError, Unreachable

T = TypeVar("T")

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0
PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One event of the log as a client sees it. `seq` grows and is never reused."""

    seq: int
    time: float
    kind: str
    job_id: str
    node_id: str
    payload: dict[str, Any]

    def document(self) -> dict[str, Any]:
        return {
            "seq": self.seq,
            "time": self.time,
            "kind": self.kind,
            "job_id": self.job_id,
            "node_id": self.node_id,
            "payload": self.payload,
        }


@dataclass(frozen=True, slots=True)
class LogText:
    """A piece of one rank's output. `finished`: the job has ended in `state` and there is no more."""

    text: str
    end_bytes: int
    finished: bool
    state: str


@dataclass(frozen=True, slots=True)
class Patience:
    """How a follower waits for a coordinator that is away. `on_outage` is told once per outage."""

    seconds: float = PATIENCE_S
    on_outage: Callable[[HiveError], None] = lambda error: None
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    rng: random.Random = field(default_factory=random.Random)


def delay_s(tries: int, rng: random.Random) -> float:
    """Exponential with full jitter, so that many followers of one restart do not return in one instant."""
    ceiling = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(tries, 16))
    return rng.uniform(FIRST_DELAY_S / 2, ceiling)


async def resumed(
    open_at: Callable[[int], AsyncIterator[T]],
    position_of: Callable[[T], int],
    start: int,
    patience: Patience,
    is_last: Callable[[T], bool] = lambda item: False,
) -> AsyncIterator[T]:
    """Items of a stream that is opened again at the last position whenever it breaks or just ends.

    Ends after an item for which `is_last`. Raises the first error that a retry cannot mend, or Unreachable once an
    outage has lasted `patience.seconds`.
    """
    position, tries = start, 0
    away_since: float | None = None
    while True:
        try:
            async for item in open_at(position):
                tries, away_since = 0, None
                if position_of(item) > position or is_last(item):
                    position = max(position, position_of(item))
                    yield item
                if is_last(item):
                    return
            problem: HiveError = Unreachable("the coordinator closed the stream", "is it being restarted?")
        except HiveError as error:
            if not TABLE[error.code].retryable:
                raise
            problem = error
        now = patience.clock()
        if away_since is None:
            away_since = now
        if tries == 1:  # the first try again is silent: a stream that merely reached its deadline is no outage
            patience.on_outage(problem)
        if now - away_since > patience.seconds:
            raise Unreachable(
                f"the coordinator has been away for {now - away_since:.0f} s: {problem.message}",
                "start it again with hive coordinator start; the job is not lost",
            )
        await patience.pause(delay_s(tries, patience.rng))
        tries += 1
