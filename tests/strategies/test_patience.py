"""Ranks wait for one that evaluates or writes a file for longer than a step may take, but not for one that is dead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engine_harness import Job, Rank
from engine_jobs import MLP, mlp_job
from gloo_threads import among

from protos.plan import Layout
from protos.states import AttemptState, Reason
from protos.work import Outcome
from strategies.data.opening import open_splits
from strategies.evaluate_torch import MEET_EVERY_S, Score, evaluate
from strategies.group_torch import Group, single
from strategies.loss_torch import Loss

STEP_DEADLINE_S = 2.0  # of every collective; slow_files_ranks and SLOW_EVALUATION take longer
SLOW_EVALUATION = MLP.replace(
    "    def forward(self, x):",
    """    def forward(self, x):
        if not self.training and x.abs().max() > 500:
            import time
            time.sleep(3.0)""",
)


def test_a_group_is_patient_for_a_while_and_as_strict_as_before_after_it() -> None:
    def wait_for_the_other(group: Group) -> list[float]:
        group.set_deadline(0.2)
        seen = [group.deadline_s]
        with group.patient(30.0):
            seen.append(group.deadline_s)
            if group.rank:
                time.sleep(0.8)
            group.barrier()
        seen.append(group.deadline_s)
        with group.patient(0.1):
            seen.append(group.deadline_s)  # never less than usual
        return seen

    assert among(2, wait_for_the_other) == [[0.2, 30.0, 0.2, 0.2]] * 2


def test_a_subgroup_has_the_deadline_of_its_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    try:
        group = Group(0, 1, torch.device("cpu"), deadline_s=17.0, _before=frozenset())
        made = group.subgroup([0])
        assert made is not None
        backend: Any = made._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(seconds=17)
        group.set_deadline(70.0)
        assert backend.options._timeout == timedelta(seconds=70)
    finally:
        dist.destroy_process_group()


def test_ranks_that_evaluate_meet_every_few_seconds_however_slow_one_of_them_is(tmp_path: Path) -> None:
    """Every look at its clock costs the slow rank three seconds, so it meets the other after every piece."""
    job = mlp_job(tmp_path, rows=64, test_rows=40)
    data = open_splits(job.spec.data, job.data, None, test_path=job.test, loss="cross_entropy").test
    assert data is not None
    torch.manual_seed(3)
    model, loss, device = torch.nn.Linear(8, 4), Loss("cross_entropy", None), torch.device("cpu")

    def score(group: Group, samples: tuple[int, ...]) -> tuple[Score, int, int]:
        pieces, clock = 0, iter(range(10**6))

        def forward(piece: Any) -> Any:
            nonlocal pieces
            pieces += 1
            return model(piece.features)

        group.clock = (lambda: next(clock) * (MEET_EVERY_S - 0.5)) if group.rank else (lambda: 0.0)
        found = evaluate(model, forward, data, loss, group, samples, 4, device)
        return found, pieces, group.bytes_sent // 40

    (quick, slow), (alone, _, _) = among(2, lambda group: score(group, (8, 24))), score(single(), (32,))
    assert isinstance(quick, tuple) and isinstance(slow, tuple)
    assert quick[0] == slow[0]
    assert (quick[0].loss, quick[0].accuracy) == pytest.approx((alone.loss, alone.accuracy))
    assert quick[1] == 3 and slow[1] == 8
    assert quick[2] == slow[2] >= 4, "they met while one was still at work"


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


@pytest.fixture
def started() -> Iterator[list[Rank]]:
    ranks: list[Rank] = []
    yield ranks
    for rank in ranks:
        rank.end()


def start_pair(
    job: Job, port: int, started: list[Rank], slow_files: bool, memory_bytes: int | None = None, **values: Any
) -> list[Rank]:
    """`slow_files`: rank 0 takes longer than that over its first checkpoint."""
    for rank in range(2):
        harness = "slow_files_ranks" if slow_files and not rank else "engine_harness"
        task = job.task(rank, (16, 16), collective_timeout_s=STEP_DEADLINE_S, **values)
        started.append(Rank(job, port, f"node{rank}", task, memory_bytes=memory_bytes, harness=harness))
    return started


def run_pair(job: Job, port: int, started: list[Rank], **values: Any) -> list[Outcome]:
    return [rank.outcome() for rank in start_pair(job, port, started, **values)]


def slow_to_evaluate(folder: Path, code: str) -> Job:
    """Rank 1 is: it has the row that the model halts at."""
    job = mlp_job(folder, steps=6, test_rows=40, evaluate_every="end", code={"model.py": code})
    assert job.test is not None
    with np.load(job.test) as loaded:
        x, y = loaded["x"].copy(), loaded["y"]
    x[-1, 0] = 1000.0
    np.savez(job.test, x=x, y=y)
    return job


@pytest.mark.slow
def test_a_rank_may_take_longer_to_evaluate_than_a_collective_of_a_step(
    tmp_path: Path, store: dist.TCPStore, started: list[Rank]
) -> None:
    job = slow_to_evaluate(tmp_path, SLOW_EVALUATION)
    outcomes = run_pair(job, store.port, started, slow_files=False)
    assert [outcome.state for outcome in outcomes] == [AttemptState.DONE] * 2, outcomes
    assert (job.folder / "node0" / "output-0" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_rank_that_dies_in_an_evaluation_is_noticed_at_once(
    tmp_path: Path, store: dist.TCPStore, started: list[Rank]
) -> None:
    job = slow_to_evaluate(tmp_path, SLOW_EVALUATION.replace("3.0", "300.0"))
    survivor, victim = start_pair(job, store.port, started, slow_files=False)
    survivor.wait_until(lambda records: any(record.get("step") == 6 for record in records))
    victim.process.kill()
    outcome = survivor.outcome(20)
    assert outcome.fault is not None and outcome.fault.reason is Reason.PEER_LOST
    assert outcome.held_step == 6


@pytest.mark.slow
def test_a_rank_may_take_longer_to_write_a_checkpoint_than_a_collective_of_a_step(
    tmp_path: Path, store: dist.TCPStore, started: list[Rank]
) -> None:
    """Without room for a copy of the state it writes before it goes on."""
    job = mlp_job(tmp_path, steps=12, checkpoint={"every_s": 1e-6})
    outcomes = run_pair(job, store.port, started, slow_files=True, memory_bytes=1)
    assert [outcome.state for outcome in outcomes] == [AttemptState.DONE] * 2, outcomes
    assert any(record["kind"] == "checkpoint" and record["step"] < 12 for record in started[0].records())


@pytest.mark.slow
def test_a_rank_may_take_long_over_its_last_checkpoint_before_the_model_is_written_together(
    tmp_path: Path, store: dist.TCPStore, started: list[Rank]
) -> None:
    job = mlp_job(tmp_path, steps=6, checkpoint={"every_s": 1e-6})
    outcomes = run_pair(job, store.port, started, slow_files=True, layout=Layout(((0, 1),), sharded=True))
    assert [outcome.state for outcome in outcomes] == [AttemptState.DONE] * 2, outcomes
    assert [record["step"] for record in started[0].records() if record["kind"] == "checkpoint"] == [6]
    assert (job.folder / "node0" / "output-0" / "model.safetensors").is_file()
