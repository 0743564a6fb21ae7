"""The short benchmark: figures are positive and of the right size, noise never breaks them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos import documents
from protos.capacity import Calibration
from protos.ids import Fence, JobId
from protos.jobspec import parse
from protos.states import AttemptState, StopMode
from protos.work import Outcome, Progress, Task, TaskKind
from strategies import calibrate_torch, profile_layers_torch
from strategies.context import Channel, KeyValueStore, TaskContext, Workspace


class Channelled:
    def __init__(self, stop: StopMode | None = None) -> None:
        self.stop = stop

    @property
    def store(self) -> KeyValueStore:
        raise AssertionError("no rendezvous in this task")

    def ready(self) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def checkpoint(self, folder: Path, step: int, samples: int) -> None: ...
    def uploading(self) -> bool:
        return False

    def leave(self, outcome: Outcome) -> None:
        raise AssertionError("there are no others to wait for")

    def artifact(self, name: str, path: Path) -> None: ...

    def stop_requested(self) -> StopMode | None:
        return self.stop

    def on_stop(self, callback: Callable[[StopMode], None]) -> None: ...


def context(folder: Path, stop: StopMode | None = None) -> TaskContext:
    spec = parse({"model": {"source": "m.py:f"}, "data": {"source": "builtin:digits"}})
    task = Task(TaskKind.CALIBRATE, JobId("j"), Fence(1), 0, 1, "", spec, (1,))
    workspace = Workspace(None, None, None, None, folder, folder)
    return TaskContext(task, workspace, cast(Channel, Channelled(stop)), "", 1, "cpu", "n")


def test_a_calibration_is_complete_positive_and_short(tmp_path: Path) -> None:
    outcome = calibrate_torch.calibrate(context(tmp_path))
    assert outcome.state is AttemptState.DONE, outcome.fault
    found = documents.decode(Calibration, outcome.document)
    assert set(found.flops) == {"fp32", "bf16"}
    assert set(found.families) == {"matmul", "conv", "rnn", "embedding", "tiny"}
    for rate in (*found.flops.values(), found.memory_bandwidth):
        assert 0 < rate.p50 <= rate.best
        assert rate.spread >= 0
    for family in found.families.values():
        assert family.flops > 0
        assert 0 < family.overhead_s < 1
    assert found.flops["fp32"].best > 1e8
    assert found.memory_bandwidth.best > 1e8
    assert (found.torch, found.threads) == (torch.__version__, 1)


def test_a_stop_ends_it_between_measurements(tmp_path: Path) -> None:
    started = time.monotonic()
    outcome = calibrate_torch.calibrate(context(tmp_path, StopMode.CANCEL))
    assert outcome.state is AttemptState.FAILED
    assert outcome.fault is not None
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("family", sorted(calibrate_torch.workloads()))
def test_the_stated_flops_are_what_identification_counts(family: str) -> None:
    work = calibrate_torch.workloads()[family]()

    def at(batch: int) -> profile_layers_torch.Trace:
        features = work.sample.expand(batch, *work.sample.shape)
        return profile_layers_torch.trace(work.model, lambda: work.model(features), lambda output: None)

    small, large = at(2), at(4)
    assert small.output.shape == (2, work.classes)
    layers = profile_layers_torch.layers(work.model, small, large, (2, 4))
    assert sum(layer.flops_per_sample for layer in layers) == work.forward_flops


def test_the_line_is_found() -> None:
    rate = calibrate_torch.fit((1e6, 1e8), ([0.003, 0.0021, 0.0021], [0.012, 0.012, 0.5]))
    assert rate.flops == pytest.approx((1e8 - 1e6) / (0.012 - 0.0021))
    assert rate.overhead_s == pytest.approx(0.0021 - 1e6 / rate.flops)


def test_what_is_counted_elsewhere_is_taken_off_the_overhead() -> None:
    seconds = ([0.002] * 3, [0.011] * 3)
    whole = calibrate_torch.fit((1e6, 1e8), seconds)
    less = calibrate_torch.fit((1e6, 1e8), seconds, elsewhere_s=0.0005)
    assert less.flops == whole.flops
    assert less.overhead_s == pytest.approx(whole.overhead_s - 0.0005)


durations = st.lists(st.floats(1e-7, 100), min_size=3, max_size=5)


@given(durations, durations, st.floats(0, 10))
def test_noise_never_gives_an_impossible_figure(small: list[float], large: list[float], elsewhere_s: float) -> None:
    rate = calibrate_torch.fit((1e3, 1e8), (small, large), elsewhere_s)
    assert 0 < rate.flops < float("inf")
    assert 0 < rate.overhead_s <= max(1e-6, *small, *large)
    assert rate.spread >= 0
