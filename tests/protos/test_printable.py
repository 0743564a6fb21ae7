"""Text of others reaches a terminal as text: nothing of it is obeyed."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.command_line import say, show_error, show_output, table
from protos.errors import NotFound
from protos.printable import printable, without_sequences

HOSTILE = "a\x1b[2J\x1b]0;owned\x07b\x9b31mc\u202ed"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert printable("Grüße \U0001f41d\u00a0x") == "Grüße \U0001f41d\u00a0x"
    assert printable(HOSTILE) == "a\\x1b[2J\\x1b]0;owned\\x07b\\x9b31mc\\u202ed"
    assert printable("a\nb\tc\r", "\n") == "a\nb\\tc\\r"


@given(text=st.text())
def test_no_text_keeps_a_control_character(text: str) -> None:
    assert all(unicodedata.category(c)[0] != "C" for c in printable(text))
    assert all(c in "\n\t" or unicodedata.category(c)[0] != "C" for c in without_sequences(text))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m\tx\r\n", "red\tx\n"),
        ("10%\r20%\r\n", "10%\n20%\n"),
        ("\x1b]52;c;cm0gLXJm\x07done \x1b]0;title\x1b\\ok", "done ok"),
        ("torn \x1b[", "torn "),
        (HOSTILE, "abcd"),
    ],
)
def test_output_for_a_terminal_has_no_sequences(text: str, shown: str) -> None:
    assert without_sequences(text) == shown


def test_output_is_raw_in_a_pipe_and_safe_on_a_terminal() -> None:
    pipe, terminal = io.StringIO(), Terminal()
    show_output(HOSTILE, pipe)
    show_output(HOSTILE, terminal)
    assert (pipe.getvalue(), terminal.getvalue()) == (HOSTILE, "abcd")


def test_errors_prose_and_tables_are_safe(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(NotFound(HOSTILE, HOSTILE, details=(HOSTILE,)), as_json=False)
    say(HOSTILE)
    captured = capsys.readouterr()
    shown = table(["A", "B"], [(HOSTILE, "x\ny")])
    assert captured.err.count("\\x1b[2J") == 4 and shown.count("\\x1b[2J") == 1
    assert not set("\x1b\x07\x9b\u202e") & set(captured.err + shown)
    assert "x\\ny" in shown
