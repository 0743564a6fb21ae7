"""What is usual of the steps of a rank."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from strategies.cpu_time import CpuSeconds, CpuTime
from strategies.step_record import StepRecord


@dataclass
class Counted:
    sync_s: float = 0.0
    bytes_sent: int = 0


def test_a_step_is_what_most_steps_were_without_what_lies_between_them() -> None:
    """A slow first step, and waiting and bytes of evaluations between the steps, do not count."""
    counted, now = Counted(), [0.0]
    record = StepRecord(counted, lambda: now[0], lambda: CpuSeconds(0.5 * now[0], 0.1 * now[0]))
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
    assert (record.cpu_s, record.carrying_s) == (pytest.approx(0.5), pytest.approx(0.1))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are known by their names on Linux")
def test_threads_that_carry_collectives_are_told_apart_from_those_that_compute() -> None:
    """A thread with the name that gloo gives its own computes beside this one: it counts as carrying."""
    ready, done = threading.Event(), threading.Event()

    def carry() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("gloo_tcp_loop")
        ready.set()
        while not done.is_set():
            sum(range(1000))

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        assert ready.wait(10)
        cpu = CpuTime()
        before = cpu.seconds()
        end = time.process_time() + 0.2
        while time.process_time() < end:
            sum(range(1000))
        after = cpu.seconds()
    finally:
        done.set()
        thread.join()
    computing, carrying = after.computing - before.computing, after.carrying - before.carrying
    assert computing > 0.02 and carrying > 0.02
    assert computing + carrying == pytest.approx(0.2, rel=0.2)
    assert cpu.seconds().carrying >= 0, "also once the thread has ended"


def test_what_steps_take_lately_is_of_the_last_half_minute() -> None:
    counted, now = Counted(), [0.0]
    record = StepRecord(counted, lambda: now[0], lambda: CpuSeconds(0.5 * now[0], 0.1 * now[0]))
    assert record.lately() is None
    for seconds in (9.0, *[0.5] * 200, *[2.0] * 20):
        record.begin()
        now[0] += seconds
        counted.sync_s += 0.1
        record.end()
    times = record.lately()
    assert times is not None and record.compute_s == pytest.approx(0.4), "most of its steps were quick"
    assert times.step_compute_s == pytest.approx(1.9) and times.step_sync_s == pytest.approx(0.1)
    assert (times.step_cpu_s, times.step_carrying_s) == (pytest.approx(1.0), pytest.approx(0.2))
