"""Log lines: one line per event whatever is in it, ours by level, everybody else's from warnings on."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from protos import log
from protos.errors import HiveError


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    root, ours = logging.getLogger(), logging.getLogger("hive")
    before = (root.handlers, root.level, ours.level)
    stream = io.StringIO()
    log.write_to(stream, "info")
    yield stream
    root.handlers, _, _ = before
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_a_line_holds_the_event_and_its_fields(written: io.StringIO) -> None:
    log.Log("hive.node").info("connected", node="n-1", rtt_s=0.00012345678)
    assert written.getvalue().endswith("INFO    connected node=n-1 rtt_s=0.000123457\n")


def test_a_value_cannot_start_another_line(written: io.StringIO) -> None:
    log.Log("hive.node").warning("refused", why="one\n2026 ERROR forged line", name="")
    assert written.getvalue().count("\n") == 1
    assert r"'one\n2026 ERROR forged line'" in written.getvalue()


def test_levels_are_ours_to_choose_and_others_speak_from_warnings_on(written: io.StringIO) -> None:
    log.Log("hive.node").debug("not shown")
    logging.getLogger("zeroconf").info("not shown either")
    logging.getLogger("zeroconf").warning("shown")
    assert written.getvalue().count("shown") == 1


def test_an_exception_brings_its_traceback(written: io.StringIO) -> None:
    try:
        raise ValueError("inside")
    except ValueError:
        log.Log("hive.node").exception("failed", job="j-1")
    assert "ERROR   failed job=j-1\nTraceback" in written.getvalue()
    assert "ValueError: inside" in written.getvalue()


def test_a_level_that_is_none_is_refused() -> None:
    with pytest.raises(HiveError, match="not a log level"):
        log.write_to(io.StringIO(), "loud")
