"""The key-value stores in which the ranks of one generation find each other: torch.distributed.Store's semantics.

In memory on purpose: a store is needed only between ACCEPTED and READY. A coordinator that restarts in between has
lost it; that generation ends and the group is formed again. Bounded in keys and bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protos import limits
from protos.errors import DeadlineExceeded, ErrorCode, Exhausted, HiveError
from protos.ids import Fence, JobId

_KEYLESS = frozenset({"check", "wait", "num_keys"})
_ANSWERS_KEPT = 10_000  # far more than can be under way at once
_NOT_IDEMPOTENT = frozenset({"add", "compare_set", "delete_key"})


@dataclass(slots=True)
class _Space:
    values: dict[str, bytes] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    closed: bool = False
    answered: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    bytes: int = 0  # of all values


class Rendezvous:
    """All open stores by (job, fence). `may_use` says whether a generation is current: others are refused."""

    def __init__(self, may_use: Callable[[JobId, Fence], bool]) -> None:
        self._spaces: dict[tuple[JobId, Fence], _Space] = {}
        self._may_use = may_use

    async def close(self, job_id: JobId, fence: Fence) -> None:
        """Forget a generation; whoever still waits in it is refused."""
        space = self._spaces.pop((job_id, fence), None)
        if space is not None:
            async with space.changed:
                space.closed = True
                space.changed.notify_all()

    async def call(
        self,
        job_id: JobId,
        fence: Fence,
        operation: str,
        keys: Sequence[str],
        value: bytes,
        expected: bytes,
        amount: int,
        timeout_s: float,
        request: str = "",
    ) -> tuple[bytes, int]:
        """One store operation; returns (value, number), whichever the operation has.

        `request` names a call that may arrive twice (sent again after a lost connection): it changes the store once.

        Raises DeadlineExceeded when keys do not appear in time, HiveError STALE_FENCE for a generation that is over.
        """
        if not self._may_use(job_id, fence):
            raise HiveError(f"{job_id} is not at fence {fence}", code=ErrorCode.STALE_FENCE)
        space = self._spaces.setdefault((job_id, fence), _Space())
        if request in space.answered:
            return space.answered[request]
        async with space.changed:
            answer = await self._perform(space, operation, keys, value, expected, amount, timeout_s)
        if request and operation in _NOT_IDEMPOTENT:
            space.answered[request] = answer
            if len(space.answered) > _ANSWERS_KEPT:
                del space.answered[next(iter(space.answered))]
        return answer

    async def _perform(
        self,
        space: _Space,
        operation: str,
        keys: Sequence[str],
        value: bytes,
        expected: bytes,
        amount: int,
        timeout_s: float,
    ) -> tuple[bytes, int]:
        if not keys and operation not in _KEYLESS:
            raise HiveError(f"store operation {operation!r} without a key", code=ErrorCode.USAGE)
        key = keys[0] if keys else ""
        match operation:
            case "set":
                self._put(space, key, value)
                return b"", 0
            case "get":
                await self._wait(space, keys, timeout_s)
                return space.values[key], 0
            case "add":
                number = int(space.values.get(key, b"0")) + amount
                self._put(space, key, str(number).encode())
                return b"", number
            case "check":
                return b"", int(all(name in space.values for name in keys))
            case "wait":
                await self._wait(space, keys, timeout_s)
                return b"", 0
            case "compare_set":
                current = space.values.get(key)
                if current == expected or (current is None and expected == b""):
                    self._put(space, key, value)
                    return value, 0
                return current if current is not None else expected, 0
            case "delete_key":
                gone = space.values.pop(key, None)
                space.bytes -= len(gone or b"")
                return b"", int(gone is not None)
            case "num_keys":
                return b"", len(space.values)
            case _:
                raise HiveError(f"unknown store operation {operation!r}", code=ErrorCode.USAGE)

    @staticmethod
    def _put(space: _Space, key: str, value: bytes) -> None:
        if len(value) > limits.MAX_STORE_VALUE_BYTES or len(key) > 1024:
            raise Exhausted("a rendezvous value is over its limit", "this is a bug in a strategy: report it")
        if key not in space.values and len(space.values) >= limits.MAX_STORE_KEYS:
            raise Exhausted("a rendezvous store has too many keys", "this is a bug in a strategy: report it")
        grown = space.bytes + len(value) - len(space.values.get(key, b""))
        if grown > limits.MAX_STORE_BYTES:
            raise Exhausted("a rendezvous store holds too much", "this is a bug in a strategy: report it")
        space.values[key], space.bytes = value, grown
        space.changed.notify_all()

    @staticmethod
    async def _wait(space: _Space, keys: Sequence[str], timeout_s: float) -> None:
        def there() -> bool:
            return space.closed or all(key in space.values for key in keys)

        try:
            async with asyncio.timeout(timeout_s):
                await space.changed.wait_for(there)
        except TimeoutError:
            missing = [key for key in keys if key not in space.values]
            raise DeadlineExceeded(f"nobody set {', '.join(missing[:3])} within {timeout_s:.0f} s") from None
        if space.closed:
            raise HiveError("this group is over", code=ErrorCode.STALE_FENCE)
