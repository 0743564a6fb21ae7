"""torch.distributed's Store over a task's KeyValueStore: rendezvous without a listening TCPStore.

Owns the translation of calls and the deadline of each. A wait is asked in short slices, so that a stop request ends a
rendezvous whose peers never arrive. Keys live below the attempt's fence: what another generation wrote is never seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

from protos.errors import DeadlineExceeded
from strategies.context import KeyValueStore

SLICE_S = 0.5


class ChannelStore(Store):
    """`stopped` is asked between slices; a true answer raises DeadlineExceeded at once."""

    def __init__(self, store: KeyValueStore, timeout_s: float, stopped: Callable[[], bool]) -> None:
        super().__init__()
        self._store = store
        self._timeout_s = timeout_s
        self._stopped = stopped

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        value: bytes = self._sliced(key, self._timeout_s, lambda slice_s: self._store.get(key, slice_s))
        return value

    def add(self, key: str, amount: int) -> int:
        return self._store.add(key, amount)

    def check(self, keys: Sequence[str]) -> bool:
        return self._store.check(list(keys))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        limit_s = self._timeout_s if timeout is None else min(timeout.total_seconds(), self._timeout_s)
        self._sliced(", ".join(keys), limit_s, lambda slice_s: self._store.wait(list(keys), slice_s))

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        return self._store.compare_set(key, _bytes(expected), _bytes(desired))

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(key)

    def num_keys(self) -> int:
        return self._store.num_keys()

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    def clone(self) -> ChannelStore:
        return ChannelStore(self._store, self._timeout_s, self._stopped)

    def _sliced(self, what: str, limit_s: float, ask: Callable[[float], Any]) -> Any:
        deadline = time.monotonic() + limit_s
        while True:
            left_s = deadline - time.monotonic()
            if self._stopped():
                raise DeadlineExceeded(f"stopped while waiting for {what}", "the attempt was asked to stop")
            try:
                return ask(max(min(SLICE_S, left_s), 0.001))
            except DeadlineExceeded:
                if left_s <= SLICE_S:
                    raise


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
