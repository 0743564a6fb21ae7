"""Who has the last word when a rank's own thread does not come back from a wait."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from protos.states import AttemptState
from protos.work import Outcome
from strategies import stuck_wait
from strategies.stuck_wait import LastWord

OWN, OTHERS = Outcome(AttemptState.FAILED, step=1), Outcome(AttemptState.FAILED, step=2)


@dataclass
class Waits:
    waits_since: float | None = None


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stuck_wait, "STUCK_S", 0.05)


class Stopping:
    """The thread that has broken the group."""

    def __init__(self, word: LastWord) -> None:
        self.left: list[Outcome] = []
        self.gone = threading.Event()
        self.thread = threading.Thread(target=word.say_if_stuck, args=(lambda: OTHERS, self._leave), daemon=True)
        self.thread.start()

    def _leave(self, outcome: Outcome) -> None:
        self.left.append(outcome)
        self.gone.set()
        threading.Event().wait()  # the process would be over


@pytest.mark.parametrize("end", ["it failed", "it finished"])
def test_of_a_rank_that_does_not_come_back_the_other_thread_speaks_and_the_rank_never_does(end: str) -> None:
    word = LastWord(Waits(17.0))
    stopping = Stopping(word)
    assert stopping.gone.wait(10)
    assert stopping.left == [OTHERS]
    said: list[object] = []
    late = {"it failed": lambda: said.append(word.say(lambda: OWN)), "it finished": lambda: said.append(word.over())}
    thread = threading.Thread(target=late[end], daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and not said


def test_a_rank_that_comes_back_speaks_for_itself() -> None:
    group = Waits(17.0)
    word = LastWord(group)
    assert word.say(lambda: OWN) == OWN
    stopping = Stopping(word)
    stopping.thread.join(10)
    assert not stopping.thread.is_alive() and not stopping.left


class Moving:
    """Computes, then waits here, then there; comes back after a while."""

    def __init__(self) -> None:
        self.word = LastWord(self)
        self.looks = 0

    @property
    def waits_since(self) -> float | None:
        self.looks += 1
        if self.looks > 6:
            self.word.over()
        return None if self.looks % 4 == 1 else float(self.looks)

    @waits_since.setter
    def waits_since(self, value: float | None) -> None:
        raise AssertionError("nobody else says so")


def test_one_that_computes_or_goes_from_wait_to_wait_is_not_stuck() -> None:
    group = Moving()
    stopping = Stopping(group.word)
    stopping.thread.join(10)
    assert not stopping.thread.is_alive() and not stopping.left and group.looks > 6
