"""When the parts of a checkpoint are written and which are uploaded, whatever the ranks' speeds: a simulation of a
group with the coordinator's own book of parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st

from coordinator.checkpoints import PENDING_SETS, with_uploaded
from protos.artifact import Manifest
from protos.ids import Fence
from protos.work import Checkpoint, Checkpoints
from strategies.checkpoint_pace_torch import FIRST_STEPS, CheckpointPace
from strategies.group_torch import Group

STEPS = 400


@dataclass
class Simulated:
    """Ranks in lockstep, a step a second. `upload_s` of each: from the step at which a part is written to its arrival,
    None when uploads fail at once."""

    every_s: float
    upload_s: list[float | None]
    now_s: float = 0.0
    known: Checkpoints = field(default_factory=Checkpoints)
    written: list[int] = field(default_factory=list)
    uploaded: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        ranks = range(len(self.upload_s))
        self.under_way: list[tuple[float, int] | None] = [None for _ in ranks]
        self.paces = [self.pace(rank) for rank in ranks]

    def pace(self, rank: int) -> CheckpointPace:
        group = Group(rank, len(self.upload_s), torch.device("cpu"))
        busy = lambda: self.under_way[rank] is not None  # noqa: E731
        return CheckpointPace(group, 0, self.every_s, busy, lambda: self.now_s)

    def run(self) -> Simulated:
        for step in range(1, STEPS + 1):
            self.now_s = float(step)
            self.arrive()
            talks = {pace.talks(step) for pace in self.paces}
            assert len(talks) == 1, "a rank would wait for ever"
            if talks == {True}:
                said = [pace.proposal(step) for pace in self.paces]
                distance, busy = (max(each) for each in zip(*said, strict=True))
                due = {pace.agreed(step, distance, busy) for pace in self.paces}
                assert len(due) == 1
                if due == {True}:
                    self.write(step)
        return self

    def write(self, step: int) -> None:
        self.written.append(step)
        uploads = {pace.uploads(step) for pace in self.paces}
        assert len(uploads) == 1, "some parts of a step, and not the others"
        if uploads == {True}:
            assert not any(self.under_way)
            self.uploaded.append(step)
            for rank, takes_s in enumerate(self.upload_s):
                self.under_way[rank] = None if takes_s is None else (self.now_s + takes_s, step)

    def arrive(self) -> None:
        for rank, upload in sorted(enumerate(self.under_way), key=lambda each: each[1] or (0.0, 0)):
            if upload is not None and upload[0] <= self.now_s:
                self.under_way[rank] = None
                part = Checkpoint(upload[1], 0, Manifest(()), Fence(1), rank, len(self.upload_s))
                self.known = with_uploaded(self.known, part)
                assert len({each.step for each in self.known.pending}) <= PENDING_SETS
                if self.known.newest is not None and self.known.newest.step not in self.whole:
                    self.whole.append(self.known.newest.step)


RATIOS = st.floats(0.01, 8.0)


@given(st.integers(1, 20), st.lists(RATIOS, min_size=2, max_size=5))
def test_every_set_that_is_uploaded_becomes_whole_at_any_speeds(every_s: int, ratios: list[float]) -> None:
    """However long the slowest takes, the coordinator is never behind by more than an upload and two intervals."""
    ran = Simulated(float(every_s), [ratio * every_s for ratio in ratios]).run()
    slowest_s = max(ratios) * every_s
    assert ran.whole == ran.uploaded[: len(ran.whole)] and len(ran.uploaded) - len(ran.whole) <= 1
    gaps = [after - before for before, after in zip([0, *ran.uploaded], ran.uploaded, strict=False)]
    assert max(gaps) <= math.ceil(slowest_s / every_s) * every_s + every_s + FIRST_STEPS
    assert len(ran.written) >= (STEPS - FIRST_STEPS) // every_s - 1, (
        "what lies on the nodes' disks is as new as it was asked for"
    )


def test_a_rank_three_times_as_slow_as_the_interval_does_not_keep_every_set_from_being_whole() -> None:
    ran = Simulated(10.0, [10.0, 35.0]).run()
    assert len(ran.whole) >= STEPS // 40 - 1


def test_uploads_that_fail_do_not_keep_the_others_waiting() -> None:
    ran = Simulated(10.0, [25.0, None]).run()
    assert ran.whole == [] and len(ran.uploaded) >= STEPS // 30 - 1
