"""The verdict of the sweep over the types of transformers, and its limit of time."""

from __future__ import annotations

import contextlib
import signal

import pytest

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'hive[hf]'")

from bench.identify_transformers import LEAST_COMPARED, OutOfTime, Result, at_most, report

EXACT = [Result(f"type{number}") for number in range(LEAST_COMPARED)]


@pytest.mark.parametrize(
    ("results", "code", "said"),
    [
        (EXACT, 0, "exact 300"),
        (EXACT[1:], 1, "only 299 types were compared"),
        ([*EXACT[1:], Result("odd", skipped="not built")], 1, "only 299 types were compared"),
        ([*EXACT, Result("odd", problem="2 parameters, not 3")], 1, "differs  odd"),
    ],
)
def test_too_few_types_are_no_success(
    results: list[Result], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(results, at_least=LEAST_COMPARED) == code
    assert said in capsys.readouterr().out


def test_the_limit_of_time_is_not_swallowed_with_what_transformers_raises() -> None:
    with pytest.raises(OutOfTime, match="over 60 s"), at_most(60), contextlib.suppress(Exception):
        signal.raise_signal(signal.SIGALRM)
