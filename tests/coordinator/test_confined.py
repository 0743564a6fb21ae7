"""A confined process and all that it started end with the answer, however it ends itself."""

from __future__ import annotations

import asyncio
import os

import pytest

from coordinator.confined import answer_of

PROGRAMS = "tests.coordinator.confined_programs"


def answer(program: str, deadline_s: float = 20.0) -> bytes:
    """What it answers, once nothing of it lives any more: who inherited the pipe held it open."""
    reader, writer = os.pipe()
    try:
        return asyncio.run(
            answer_of(
                PROGRAMS, program, str(writer), stdin=b"", most_bytes=100, deadline_s=deadline_s, descriptors=(writer,)
            )
        )
    finally:
        os.close(writer)
        assert os.read(reader, 1) == b""
        os.close(reader)


def test_what_it_started_does_not_outlive_it() -> None:
    assert answer("leaves a process") == b"done"


def test_one_that_says_too_much_has_no_answer() -> None:
    assert answer("never stops talking") == b""


def test_one_that_closes_its_answer_and_goes_on_ends_at_the_deadline() -> None:
    with pytest.raises(TimeoutError):
        answer("goes on in silence", deadline_s=1.0)
