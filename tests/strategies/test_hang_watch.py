"""The stack of what hangs is shown once, in time, and only when it hangs."""

from __future__ import annotations

import threading

import pytest

from strategies.hang_watch import stack_shown_after


def test_the_stack_of_what_hangs_ends_with_the_line_it_is_at(capsys: pytest.CaptureFixture[str]) -> None:
    def build_that_hangs() -> None:
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        timers[-1].join(20)  # ends when it has shown the stack

    with stack_shown_after(0.05):
        build_that_hangs()
    shown = capsys.readouterr().err
    assert shown.startswith("still here after 0.05 s (most recent call last):")
    assert "in build_that_hangs" in shown and "timers[-1].join(20)" in shown


def test_what_ends_in_time_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with stack_shown_after(60.0):
        pass
    assert capsys.readouterr().err == ""
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)
