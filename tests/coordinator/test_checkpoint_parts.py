"""Uploaded parts of checkpoints: complete only together, never older than what is known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.checkpoints import PENDING_SETS, with_uploaded
from protos import documents
from protos.artifact import FileEntry, Manifest, digest_bytes
from protos.ids import Fence
from protos.work import Checkpoint, Checkpoints


def part(step: int, number: int = 0, parts: int = 1, fence: int = 1) -> Checkpoint:
    content = f"{step} {number} {fence}".encode()
    manifest = Manifest((FileEntry("state.json", digest_bytes(content), len(content)),))
    return Checkpoint(step, 10 * step, manifest, Fence(fence), number, parts)


def after(*uploads: Checkpoint) -> Checkpoints:
    known = Checkpoints()
    for upload in uploads:
        known = with_uploaded(known, upload)
    return documents.decode(Checkpoints, documents.encode(known))


def test_a_whole_state_is_the_newest_at_once() -> None:
    assert after(part(3), part(5)).newest == part(5)
    assert after(part(5), part(3)).newest == part(5)


def test_parts_are_a_state_once_all_of_them_are_there_in_any_order() -> None:
    assert after(part(5, 1, 2)).newest is None
    found = after(part(5, 1, 2), part(5, 0, 2)).newest
    assert found is not None and (found.step, found.samples, found.parts) == (5, 50, 1)
    assert [entry.path for entry in found.manifest.files] == ["1-of-2/state.json", "2-of-2/state.json"]


def test_parts_of_two_generations_make_no_state() -> None:
    assert after(part(5, 0, 2, fence=1), part(5, 1, 2, fence=2)).newest is None


def test_a_slow_part_of_an_older_state_is_forgotten_when_a_newer_one_is_complete() -> None:
    known = after(part(5, 0, 2), part(9, 0, 2), part(9, 1, 2), part(5, 1, 2))
    assert known.newest is not None and known.newest.step == 9 and known.pending == ()


def test_a_part_that_cannot_be_is_refused() -> None:
    for odd in (part(5, 2, 2), part(5, -1, 2), part(5, 0, 0), part(5, 0, 1_000_000)):
        assert after(odd) == Checkpoints()


def test_parts_of_a_group_that_went_back_count_although_others_had_been_further() -> None:
    lost = (part(50, 0, 2), part(60, 0, 2))
    known = after(*lost, part(45, 0, 2, fence=2), part(45, 1, 2, fence=2))
    assert known.newest is not None and known.newest.step == 45


def test_the_set_that_has_come_furthest_waits_for_its_last_part() -> None:
    newer = (part(step, 0, 3) for step in (6, 7, 8))
    known = after(part(5, 0, 3), part(5, 1, 3), *newer, part(5, 2, 3))
    assert known.newest is not None and known.newest.step == 5
    assert [each.step for each in known.pending] == [8]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2), st.integers(1, 2)), max_size=30))
def test_the_newest_never_goes_back_and_little_waits(uploads: list[tuple[int, int, int]]) -> None:
    known, newest = Checkpoints(), 0
    seen: dict[tuple[int, int], set[int]] = {}
    for step, number, fence in uploads:
        known = with_uploaded(known, part(step, number, 3, fence))
        if step > newest:
            seen.setdefault((step, fence), set()).add(number)
        step_now = known.newest.step if known.newest is not None else 0
        assert step_now >= newest
        newest = step_now
        assert len({(each.step, each.fence) for each in known.pending}) <= PENDING_SETS
        assert all(each.step > newest for each in known.pending)
