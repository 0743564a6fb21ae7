"""Who sends which box of which tensor to whom, and what the ranks have together: pure."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import HiveError
from strategies.checkpoint_name import CheckpointName, parse_folder, parse_part, part_folder
from strategies.extent import Extent
from strategies.state_sync_torch import newest_together
from strategies.state_transfer_torch import MODEL, Held, Key, plan_transfers

NAME: Key = (MODEL, "w")


def bounds(length: int, cuts: list[int]) -> list[tuple[int, int]]:
    places = sorted({0, length, *(cut % (length + 1) for cut in cuts)})
    return list(pairwise(places))


def boxes(shape: tuple[int, int], dimension: int, cuts: list[int]) -> list[Extent]:
    found = []
    for start, stop in bounds(shape[dimension], cuts):
        starts, sizes = [0, 0], list(shape)
        starts[dimension], sizes[dimension] = start, stop - start
        found.append(Extent(shape, tuple(starts), tuple(sizes)))
    return found


@given(
    st.tuples(st.integers(1, 7), st.integers(1, 5)),
    st.lists(st.integers(0, 20), max_size=3),
    st.lists(st.integers(0, 20), max_size=3),
    st.integers(0, 1),
    st.integers(0, 1),
    st.booleans(),
)
def test_any_cut_is_read_by_any_other(
    shape: tuple[int, int], had: list[int], wanted: list[int], along: int, across: int, own_first: bool
) -> None:
    """Every element that is needed arrives exactly once and is the right one."""
    have, need = boxes(shape, along, had), boxes(shape, across, wanted)
    ranks = max(len(have), len(need))
    whole = np.arange(shape[0] * shape[1]).reshape(shape)
    having = [{NAME: [Held("float32", have[rank])]} if rank < len(have) else {} for rank in range(ranks)]
    needs = [{NAME: need[rank]} if rank < len(need) else {} for rank in range(ranks)]
    filled = [np.full(box.size, -1) for box in need]
    times = [np.zeros(box.size, dtype=int) for box in need]
    for transfer in plan_transfers(having, needs, own_first=own_first):
        assert have[transfer.source].overlap(transfer.box) == transfer.box
        place = transfer.box.inside(need[transfer.target])
        filled[transfer.target][place] = whole[transfer.box.inside(Extent.whole(shape))]
        times[transfer.target][place] += 1
    for box, values, count in zip(need, filled, times, strict=True):
        assert np.array_equal(values, whole[box.inside(Extent.whole(shape))]) and (count == 1).all()


def test_a_rank_takes_what_it_has_and_else_the_lowest_ranks() -> None:
    whole = Extent.whole((4, 2))
    having = [{NAME: [Held("float32", whole)]}, {NAME: [Held("float32", whole)]}, {}]
    needs = [{NAME: whole}, {NAME: whole}, {NAME: whole}]
    assert [(t.source, t.target) for t in plan_transfers(having, needs)] == [(0, 0), (1, 1), (0, 2)]
    assert [t.source for t in plan_transfers(having, needs, own_first=False)] == [0, 0, 0]


def test_a_part_that_is_nowhere_is_said() -> None:
    half = Extent((4, 2), (0, 0), (2, 2))
    with pytest.raises(HiveError, match=r"\[4, 2\]"):
        plan_transfers([{NAME: [Held("float32", half)]}], [{NAME: Extent.whole((4, 2))}])


def test_folder_names_say_what_they_hold() -> None:
    for name in (CheckpointName(12), CheckpointName(7, 3, 1, 4), CheckpointName(123456789, 10, 0, 2)):
        assert parse_folder(name.folder) == name
    assert parse_part(part_folder(1, 3), 12) == CheckpointName(12, 0, 1, 3)
    for odd in ("step-1", "step-00000001.fence-1.3-of-2", "step-00000001.fence-1.0-of-2", ".tmp-3", "step-00000001x"):
        assert parse_folder(odd) is None
    assert parse_part("1-of-1", 12) is None


def test_the_newest_state_that_the_ranks_have_together_counts() -> None:
    whole = [CheckpointName(10)]
    assert newest_together([[], []]) is None
    found = newest_together([[], whole, whole])
    assert found is not None and (found.step, found.source) == (10, 1)
    parts = [CheckpointName(12, 4, number, 2) for number in range(2)]
    found = newest_together([[parts[0], *whole], [parts[1]]])
    assert found is not None and (found.step, found.source, found.names) == (12, None, frozenset(parts))
    found = newest_together([[parts[0], *whole], []])  # the other half went with its node
    assert found is not None and (found.step, found.source) == (10, 0)
    mixed = [CheckpointName(12, 4, 0, 2), CheckpointName(12, 5, 1, 2)]
    assert newest_together([[mixed[0]], [mixed[1]]]) is None
