"""Micro-batches and reading ahead: the same rows in the same order, however they are cut and whoever reads them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_jobs import mlp_job
from hypothesis import given, settings
from hypothesis import strategies as some

from strategies.batches_torch import BatchSource, MicroBatch, Slicing, bounds_of, cut
from strategies.data.dataset import Batch, Dataset
from strategies.data.opening import open_splits
from strategies.loss_torch import Loss
from strategies.reporter_torch import HALF_WINDOW, Convergence

CPU = torch.device("cpu")
LOSS = Loss("cross_entropy", None)


class SlowDataset:
    """Takes milliseconds of work per batch, as decoding from a disk would."""

    def __init__(self, inner: Dataset) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def batch(self, indices: Any) -> Batch:
        np.linalg.svd(np.ones((300, 300)))
        return self._inner.batch(indices)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A small data set in memory: several steps of it are read at once."""
    job = mlp_job(tmp_path_factory.mktemp("quick"), steps=60)
    return open_splits(job.spec.data, job.data, None, loss="cross_entropy").train


def test_reading_ahead_changes_nothing_but_who_reads(tmp_path: Path) -> None:
    job = mlp_job(tmp_path, steps=60)
    data = open_splits(job.spec.data, job.data, None, loss="cross_entropy").train
    slicing = Slicing(32, (20, 12), 1, 2, 0, True)
    plain = BatchSource(data, slicing, LOSS, CPU, 60)
    slow: Any = SlowDataset(data)
    ahead = BatchSource(slow, slicing, LOSS, CPU, 60)
    for step in range(60):
        one, other = plain.next(step), ahead.next(step)
        assert (one.epoch, one.global_rows, one.nominal_items) == (other.epoch, other.global_rows, other.nominal_items)
        for left, right in zip(one.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(left.target, right.target)
            assert isinstance(left.features, torch.Tensor) and isinstance(right.features, torch.Tensor)
            assert torch.equal(left.features, right.features)
    readers = [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
    assert len(readers) == 1, "one of the two reads ahead"
    ahead.close(wait=True)
    assert not readers[0].is_alive()


@settings(max_examples=30)  # each reads a hundred batches
@given(
    batch=some.integers(1, 70),
    samples=some.sampled_from([(1,), (3, 1), (0, 1), (1, 40)]),
    accumulate=some.integers(1, 3),
    start=some.integers(0, 40),
)
def test_steps_read_at_once_are_those_read_one_by_one(
    batch: int, samples: tuple[int, ...], accumulate: int, start: int, quick: Dataset
) -> None:
    slicing = Slicing(batch, samples, len(samples) - 1, accumulate, 0, True)
    total = start + 3 * -(-quick.rows // batch)
    many = BatchSource(quick, slicing, LOSS, CPU, total)
    for step in range(start, total):
        one, other = BatchSource(quick, slicing, LOSS, CPU, total).next(step), many.next(step)
        assert one[1:] == other[1:]
        assert len(one.micro_batches) == len(other.micro_batches)
        for left, right in zip(one.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(left.target, right.target) and left[2:] == right[2:]
            assert isinstance(left.features, torch.Tensor) and isinstance(right.features, torch.Tensor)
            assert torch.equal(left.features, right.features)


@given(rows=some.integers(1, 70), pieces=some.integers(1, 80))
def test_pieces_partition_the_slice_in_order_and_are_of_nearly_equal_size(rows: int, pieces: int) -> None:
    target = torch.arange(rows)
    found = cut(MicroBatch({"x": target}, target, rows, rows), bounds_of(0, rows, pieces), LOSS)
    assert torch.equal(torch.cat([piece.target for piece in found]), target)
    assert len(found) == min(pieces, rows)
    assert max(piece.rows for piece in found) - min(piece.rows for piece in found) <= 1
    assert sum(piece.items for piece in found) == rows


def test_convergence_is_the_relative_decrease_per_step() -> None:
    convergence = Convergence()
    rates = [convergence.add(10.0 - 0.1 * step) for step in range(2 * HALF_WINDOW)]
    assert rates[:-1] == [None] * (2 * HALF_WINDOW - 1)
    older = 10.0 - 0.1 * (HALF_WINDOW - 1) / 2
    assert rates[-1] is not None and abs(rates[-1] - 0.1 / older) < 1e-9
