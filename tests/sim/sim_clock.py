"""Time of a simulation: a heap of actions. Nothing here looks at the real clock."""

from __future__ import annotations

import heapq
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

Action = Callable[[], Awaitable[None] | None]


@dataclass(slots=True)
class Clock:
    now_s: float = 1000.0
    _heap: list[tuple[float, int, Action]] = field(default_factory=list)
    _count: int = 0

    def after(self, delay_s: float, action: Action) -> None:
        self.at(self.now_s + delay_s, action)

    def at(self, when_s: float, action: Action) -> None:
        self._count += 1
        heapq.heappush(self._heap, (max(when_s, self.now_s), self._count, action))

    def take(self) -> Action:
        """The next action; time moves to it."""
        self.now_s, _, action = heapq.heappop(self._heap)
        return action

    def __call__(self) -> float:
        return self.now_s
