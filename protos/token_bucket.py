"""A token bucket: how long to wait before the next bytes, so that a rate holds on average. The clock is passed in."""

from __future__ import annotations


class TokenBucket:
    """`rate_bytes_per_s` on average, at most `burst_bytes` at once after an idle time.

    A take larger than the burst is allowed and paid for afterwards, so any chunk size works.
    """

    def __init__(self, rate_bytes_per_s: float, burst_bytes: float, now_s: float) -> None:
        if rate_bytes_per_s <= 0 or burst_bytes <= 0:
            raise ValueError("rate and burst must be positive")
        self._rate = rate_bytes_per_s
        self._burst = burst_bytes
        self._tokens = burst_bytes
        self._last_s = now_s

    def take(self, count: int, now_s: float) -> float:
        """Counts the bytes as sent; returns the seconds to wait before sending them (0 when enough is there)."""
        elapsed = max(0.0, now_s - self._last_s)
        self._last_s = max(self._last_s, now_s)
        self._tokens = min(self._burst, self._tokens + elapsed * self._rate) - count
        return max(0.0, -self._tokens / self._rate)
