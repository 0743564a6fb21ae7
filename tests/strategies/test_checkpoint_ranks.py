"""Ranks of one node write into one folder at the same moment: each step is there once, whole, and nothing is left."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_checkpoint_files import DIGEST, state

from strategies.checkpoint_torch import MODEL_FILE, newest, problem_with, write

RANKS = 4


def at_once(root: Path, steps: list[int]) -> list[Path]:
    held = [state(step) for step in steps]
    begin = threading.Barrier(len(held))

    def hold(at: int) -> Path:
        begin.wait(10)
        return write(root, held[at], DIGEST, 2)

    with ThreadPoolExecutor(len(held)) as ranks:
        return list(ranks.map(hold, range(len(held))))


@pytest.mark.parametrize("torn", [False, True], ids=["fresh", "over a torn one"])
def test_one_step_held_by_all_ranks_at_once_is_there_once_and_whole(tmp_path: Path, torn: bool) -> None:
    final = tmp_path / "step-00000005"
    for _ in range(5):
        if torn:
            final.mkdir(exist_ok=True)
            (final / MODEL_FILE).write_bytes(b"torn")
        assert at_once(tmp_path, [5] * RANKS) == [final] * RANKS
        assert problem_with(final, DIGEST) == ""
        assert list(tmp_path.iterdir()) == [final]


def test_ranks_a_step_apart_keep_the_newest(tmp_path: Path) -> None:
    write(tmp_path, state(3), DIGEST, 2)
    at_once(tmp_path, [5, 6, 5, 6])
    found = newest(tmp_path, DIGEST)
    assert (found.step, found.skipped) == (6, ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000006"]
