"""How caps are written and what they mean; the token bucket; how a dead worker's memory is judged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from node import limits, memory_watch
from node.duty_cycle import QUANTUM_S, DutyController
from node.memory_watch import MemoryReading
from protos.errors import ErrorCode, HiveError
from protos.token_bucket import TokenBucket


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 2**30),
        ("2 gib", 2 * 2**30),
        ("1.5G", 3 * 2**29),
        ("500MB", 500_000_000),
        ("104857600", 100 * 2**20),
    ],
)
def test_a_memory_size_is_read_with_its_unit(text: str, size: int) -> None:
    assert limits.parse_memory(text) == size


@pytest.mark.parametrize(("text", "rate"), [("10MB/s", 1e7), ("80Mbit", 1e7), ("80Mbit/s", 1e7), ("1MiB", 2**20)])
def test_an_upload_rate_is_bytes_or_bits_per_second(text: str, rate: float) -> None:
    assert limits.parse_upload(text) == rate


def test_fractions_of_a_core_are_allowed() -> None:
    assert limits.parse_cpus("0.25") == 0.25
    assert limits.parse_gpus("none") == 0
    assert limits.parse_gpus("2") == 2


@given(some.text(max_size=12))
def test_a_parser_gives_a_positive_value_or_a_usage_error_with_a_hint(text: str) -> None:
    for parse in (limits.parse_cpus, limits.parse_memory, limits.parse_upload):
        try:
            assert parse(text) > 0
        except HiveError as error:
            assert error.code is ErrorCode.USAGE and error.hint


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "two", ""])
def test_a_cap_without_sense_is_refused(text: str) -> None:
    with pytest.raises(HiveError):
        limits.parse_cpus(text)


def test_the_bucket_lets_a_burst_through_and_then_holds_the_rate() -> None:
    bucket = TokenBucket(100.0, 50.0, now_s=0.0)
    assert bucket.take(50, 0.0) == 0.0
    assert bucket.take(100, 0.0) == pytest.approx(1.0)
    assert bucket.take(100, 1.0) == pytest.approx(1.0)


@given(some.lists(some.tuples(some.integers(1, 10_000), some.floats(0, 3)), min_size=1, max_size=50))
def test_bytes_sent_never_exceed_the_rate_and_one_burst(takes: list[tuple[int, float]]) -> None:
    rate, burst, now, sent = 1000.0, 500.0, 0.0, 0
    bucket = TokenBucket(rate, burst, now)
    for count, pause in takes:
        now += bucket.take(count, now)
        sent += count
        assert sent <= burst + rate * now + 1e-6
        now += pause


@given(some.floats(0.01, 4.0), some.integers(1, 4), some.floats(0.0, 0.05))
def test_the_duty_cycle_gives_the_granted_share_whatever_the_threads(cpus: float, threads: int, late: float) -> None:
    """Simulated: while running, the tree burns one CPU second per second and thread; the daemon wakes up late."""
    controller = DutyController(cpus, 0.0)
    now = used = 0.0
    while now < 60.0:
        duty = controller.step(now, used)
        elapsed = duty.wait_s + late
        now += elapsed
        used += elapsed * threads if duty.run else 0.0
    # One wake-up may overshoot by its whole length: it is paid back, but the last one may not be yet.
    assert used <= cpus * now + QUANTUM_S + 0.25 * cpus + (0.21 + late) * threads
    if cpus < threads:
        assert used >= cpus * now * 0.9 - QUANTUM_S - late * threads


def test_only_the_largest_worker_is_blamed_and_only_over_the_cap() -> None:
    reading = MemoryReading(300, {1: 100, 2: 150})
    assert memory_watch.culprit(reading, 299) == 2
    assert memory_watch.culprit(reading, 300) is None
    assert memory_watch.culprit(reading, None) is None
