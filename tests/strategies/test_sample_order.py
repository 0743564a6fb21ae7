"""The sample order: a pure function of its arguments that visits every row once and is cut exactly between ranks."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.sample_order import EpochOrder, cut, permutation, slice_of, steps

ROWS = st.integers(1, 400)


def epoch(order: EpochOrder, batch_size: int) -> list[int]:
    batches = [order.batch(step, batch_size) for step in range(steps(order.rows, batch_size))]
    assert all(len(batch) == batch_size for batch in batches[:-1])
    return [int(row) for batch in batches for row in batch]


@given(ROWS, st.integers(1, 50), st.integers(1, 40), st.integers(1, 6), st.booleans(), st.integers(0, 5))
def test_every_row_comes_exactly_once_per_epoch(
    rows: int, batch_size: int, block_rows: int, window_blocks: int, shuffle: bool, number: int
) -> None:
    order = EpochOrder("d", 1, number, rows, shuffle, block_rows, window_blocks)
    assert sorted(epoch(order, batch_size)) == list(range(rows))


@given(ROWS, st.integers(1, 50), st.integers(1, 50), st.integers(1, 40), st.integers(1, 6))
def test_the_order_does_not_depend_on_the_batch_size_or_on_what_was_asked_before(
    rows: int, one: int, other: int, block_rows: int, window_blocks: int
) -> None:
    def order() -> EpochOrder:
        return EpochOrder("d", 7, 2, rows, True, block_rows, window_blocks)

    whole = epoch(order(), one)
    assert epoch(order(), other) == whole
    last = steps(rows, one) - 1
    assert order().batch(last, one).tolist() == whole[last * one :]  # as after a resume


@given(ROWS, st.integers(1, 40), st.integers(1, 6))
def test_no_more_blocks_than_a_window_are_being_read_at_once(rows: int, block_rows: int, window_blocks: int) -> None:
    left: dict[int, int] = {}
    for row in range(rows):
        left[row // block_rows] = left.get(row // block_rows, 0) + 1
    begun: set[int] = set()
    for row in epoch(EpochOrder("d", 0, 0, rows, True, block_rows, window_blocks), 1):
        block = row // block_rows
        begun.add(block)
        assert len(begun) <= window_blocks
        left[block] -= 1
        if not left[block]:
            begun.remove(block)


def test_digest_seed_and_epoch_each_change_the_order() -> None:
    def order(digest: str = "d", seed: int = 0, number: int = 0) -> list[int]:
        return epoch(EpochOrder(digest, seed, number, 500, True, 50, 3), 64)

    orders = [order(), order(digest="e"), order(seed=1), order(number=1)]
    assert len({tuple(one) for one in orders}) == 4
    assert order() == orders[0]


def test_the_order_is_the_same_on_every_machine() -> None:
    assert permutation(10, "hive").tolist() == [0, 7, 9, 8, 6, 1, 2, 3, 4, 5]
    assert EpochOrder("digest", 3, 1, 12, True, 4, 2).batch(0, 12).tolist() == [11, 5, 10, 4, 8, 7, 9, 6, 2, 3, 0, 1]


def test_a_dataset_of_one_window_is_shuffled_fully() -> None:
    seen = np.zeros((40, 40), dtype=int)
    for seed in range(400):
        order = EpochOrder("d", seed, 0, 40, True, 10, 4).batch(0, 40)
        seen[np.arange(40), order] += 1
    assert (seen > 0).sum() > 0.995 * seen.size  # every row reaches every place
    assert seen.max() < 40


def test_without_shuffle_rows_come_in_file_order() -> None:
    assert epoch(EpochOrder("d", 0, 0, 10, False, 4, 1), 3) == list(range(10))


def test_memory_is_that_of_windows_however_many_rows_there_are() -> None:
    order = EpochOrder("d", 0, 0, 10**9, True, 65_536, 4)
    tracemalloc.start()
    batch = order.batch(steps(10**9, 256) - 1, 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch.max() < 10**9
    assert peak < 40 * 1024 * 1024


@pytest.mark.parametrize("step", [-1, 4, 100])
def test_a_step_outside_the_epoch_is_an_error(step: int) -> None:
    with pytest.raises(IndexError):
        EpochOrder("d", 0, 0, 10, True, 4, 2).batch(step, 3)


SAMPLES = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any)


@given(SAMPLES, st.integers(0, 300))
def test_slices_partition_every_batch_in_rank_order(samples: list[int], batch_rows: int) -> None:
    edges = [slice_of(batch_rows, tuple(samples), rank) for rank in range(len(samples))]
    assert edges[0][0] == 0
    assert edges[-1][1] == batch_rows
    assert all(before[1] == after[0] for before, after in pairwise(edges))


@given(SAMPLES)
def test_a_full_batch_is_cut_exactly_as_planned(samples: list[int]) -> None:
    assert cut(sum(samples), samples) == tuple(samples)


@given(SAMPLES, st.integers(0, 300))
def test_a_small_batch_is_cut_in_proportion(samples: list[int], batch_rows: int) -> None:
    for count, own in zip(cut(batch_rows, samples), samples, strict=True):
        assert abs(count - batch_rows * own / sum(samples)) < 1
        assert own > 0 or count == 0


def test_a_rank_may_get_no_row_of_the_last_batch() -> None:
    assert cut(1, (30, 2)) == (1, 0)
    assert slice_of(1, (30, 2), 1) == (1, 1)


def test_samples_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="not all zero"):
        cut(3, (0, 0))
