"""What is usual of the steps of a rank."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.step_record import StepRecord


@dataclass
class Counted:
    sync_s: float = 0.0
    bytes_sent: int = 0


def test_a_step_is_what_most_steps_were_without_what_lies_between_them() -> None:
    """A slow first step, and waiting and bytes of evaluations between the steps, do not count."""
    counted, now = Counted(), [0.0]
    record = StepRecord(counted, lambda: now[0])
    assert (record.compute_s, record.sync_s, record.bytes_sent) == (0.0, 0.0, 0)
    for seconds in (9.0, 1.0, 1.0, 1.0):
        record.begin()
        now[0] += seconds
        counted.sync_s += 0.25
        counted.bytes_sent += 100
        record.end()
        now[0] += 5.0
        counted.sync_s += 5.0
        counted.bytes_sent += 10_000
    assert (record.compute_s, record.sync_s, record.bytes_sent) == (0.75, 0.25, 100)
