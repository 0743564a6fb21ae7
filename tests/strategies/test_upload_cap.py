"""What an owner allows a node to send bounds a group: a collective starts when its bytes are allowed, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_harness import Rank, metrics_of
from engine_jobs import mlp_job

from protos.plan import Layout
from protos.states import AttemptState
from protos.token_bucket import TokenBucket
from strategies.faults_torch import PeerLost
from strategies.group_torch import UPLOAD_BURST_S, Group, broadcast_sends

RATE = 1000.0
BURST = 500.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Broken(threading.Event):
    """Waiting moves the clock, and `during` says what happens meanwhile."""

    def __init__(self, clock: Clock, during: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.clock = clock
        self.during = during

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.during()
        if not self.is_set():
            self.clock.now_s += timeout
        return self.is_set()


class Backend:
    """Ranks that are equal: notes when each collective started."""

    def __init__(self, ranks: int, clock: Clock) -> None:
        self.ranks = ranks
        self.clock = clock
        self.started_s: list[float] = []

    def size(self) -> int:
        return self.ranks

    def allreduce(self, *_: Any) -> Any:
        self.started_s.append(self.clock.now_s)
        return self

    broadcast = allgather = allreduce

    def wait(self) -> None:
        return None


def group_of(ranks: int, clock: Clock, rate: float | None, rank: int = 0) -> tuple[Group, Backend]:
    backend = Backend(ranks, clock)
    bucket = None if rate is None else TokenBucket(rate, BURST, clock())
    group = Group(rank, ranks, torch.device("cpu"), backend, broken=Broken(clock), upload=bucket, clock=clock)
    return group, backend


def test_steps_take_at_least_what_their_bytes_take_at_the_rate() -> None:
    clock = Clock()
    group, backend = group_of(2, clock, RATE)
    gradients = torch.zeros(250)  # 1000 bytes, of which each of two ranks sends 1000
    for _ in range(10):
        group.all_reduce(gradients)
    assert group.bytes_sent == 10_000
    assert backend.started_s == pytest.approx([0.5 + step for step in range(10)])
    assert group.sync_s == pytest.approx(9.5, abs=0.1)


def test_time_spent_computing_pays_for_what_is_sent_after_it() -> None:
    clock = Clock()
    group, backend = group_of(2, clock, RATE)
    for _ in range(4):
        clock.now_s += 0.5
        group.all_reduce(torch.zeros(125))
    assert backend.started_s == [0.5, 1.0, 1.5, 2.0]


def test_without_a_cap_nothing_waits_or_reads_a_clock() -> None:
    def refuse() -> float:
        raise AssertionError("the clock was read")

    group, backend = group_of(2, Clock(), None)
    group.clock = refuse
    group.all_reduce(torch.zeros(1_000_000))
    assert len(backend.started_s) == 1 and group.bytes_sent == 4_000_000


def test_a_group_that_is_broken_while_it_waits_sends_nothing() -> None:
    clock = Clock()
    group, backend = group_of(2, clock, 1.0)
    group._connections = frozenset()
    group.broken = Broken(clock, during=group.break_group)
    with pytest.raises(PeerLost, match="waited for its upload cap"):
        group.all_reduce(torch.zeros(1_000_000))
    assert backend.started_s == [] and clock.now_s == 0.0


@pytest.mark.parametrize("ranks", range(2, 18))
def test_a_broadcast_reaches_every_rank_once_and_the_source_sends_most(ranks: int) -> None:
    sends = [broadcast_sends(position, ranks) for position in range(ranks)]
    assert sum(sends) == ranks - 1
    assert sends[0] == max(sends) == (ranks - 1).bit_length()


def test_what_is_counted_is_what_each_collective_sends() -> None:
    small, tensor = torch.zeros(300, dtype=torch.uint8), torch.zeros(300_000, dtype=torch.uint8)
    sent = []
    for rank in range(3):
        group, _ = group_of(3, Clock(), None, rank)
        group.all_reduce(small)
        counts = [group.bytes_sent]
        group.all_reduce(tensor)
        counts.append(group.bytes_sent - sum(counts))
        group.all_gather(tensor)
        counts.append(group.bytes_sent - sum(counts))
        group.broadcast(tensor, source=1)
        counts.append(group.bytes_sent - sum(counts))
        sent.append(counts)
    assert sent == [[600, 400_000, 600_000, each] for each in (0, 600_000, 0)]


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.slow
def test_one_capped_rank_of_two_holds_its_rate_over_the_whole_run(tmp_path: Path, ends: ExitStack) -> None:
    rate = 4000.0
    job = mlp_job(tmp_path, steps=12)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    ranks = []
    for rank, upload in enumerate((rate, None)):
        ranks.append(Rank(job, store.port, f"node{rank}", job.task(rank, (16, 16), 1), "1", upload))
        ends.callback(ranks[-1].end)
    outcomes = [rank.outcome() for rank in ranks]
    assert [outcome.state for outcome in outcomes] == [AttemptState.DONE] * 2, outcomes
    metrics = [metric for metric in metrics_of(ranks[0].records()) if metric["stage"] == "train"]
    first, last = metrics[0], metrics[-1]
    sent = last["bytes_sent"] - first["bytes_sent"]
    assert sent > 2 * rate * UPLOAD_BURST_S
    assert last["time"] - first["time"] >= sent / rate - UPLOAD_BURST_S - 0.05


@pytest.mark.slow
def test_a_capped_stage_of_a_pipeline_holds_its_rate(tmp_path: Path, ends: ExitStack) -> None:
    """The library that runs the schedule sends by itself: the kernel paces its connections."""
    rate = 20_000.0
    job = mlp_job(tmp_path, steps=36)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    layout = Layout(((0, 1), (1, 2)), ("first",))
    ranks = []
    for rank, upload in enumerate((rate, None)):
        task = job.task(rank, (32,), 1, world_size=2, layout=layout, accumulate=2)
        ranks.append(Rank(job, store.port, f"node{rank}", task, "1", upload))
        ends.callback(ranks[-1].end)
    outcomes = [rank.outcome() for rank in ranks]
    assert [outcome.state for outcome in outcomes] == [AttemptState.DONE] * 2, outcomes
    metrics = [metric for metric in metrics_of(ranks[0].records()) if metric["stage"] == "train"]
    first, last = metrics[len(metrics) // 4], metrics[-1]
    sent = last["bytes_sent"] - first["bytes_sent"]
    assert sent > rate
    assert sent / (last["time"] - first["time"]) < 1.3 * rate
