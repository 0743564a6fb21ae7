"""Two real processes over gloo: uneven, empty and broken slices, against one process of plain torch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from engine_harness import Job, Rank, metrics_of
from engine_jobs import MLP, mlp_job, plain_torch

from protos.errors import Blame
from protos.states import AttemptState, Reason
from protos.work import Outcome
from strategies.model_torch import build

SLOW_MLP = MLP.replace(
    "        return self.second(", "        import time\n        time.sleep(0.01)\n        return self.second("
)


class Cluster:
    """Starts ranks of jobs and ends what is left of them."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self.ranks: list[Rank] = []

    def start(self, job: Job, samples: tuple[int, ...], fence: int = 1, **values: Any) -> list[Rank]:
        accumulate = values.pop("accumulate", (1,) * len(samples))
        started = []
        for rank in range(len(samples)):
            task = job.task(rank, samples, fence, accumulate=accumulate[rank], **values)
            started.append(Rank(job, self.store.port, f"node{rank}", task, str(fence)))
        self.ranks += started
        return started

    def run(self, job: Job, samples: tuple[int, ...], fence: int = 1, **values: Any) -> list[Outcome]:
        return [rank.outcome() for rank in self.start(job, samples, fence, **values)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    for rank in cluster.ranks:
        rank.end()


def curve(rank: Rank) -> list[float]:
    return [metric["loss"] for metric in metrics_of(rank.records())]


def weights(job: Job, node: str = "node0", attempt: str = "1") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(job.folder / node / f"output-{attempt}" / "model.safetensors")


def assert_equal_to_plain_torch(job: Job, losses: list[float], trained: dict[str, torch.Tensor]) -> None:
    expected_losses, expected = plain_torch(job)
    assert np.allclose(losses, expected_losses, atol=1e-5)
    for name, tensor in expected.items():
        assert torch.allclose(trained[name], tensor, atol=1e-4), name


def stepping(at_least: int) -> Any:
    return lambda records: any(record["kind"] == "progress" and record["step"] >= at_least for record in records)


@pytest.mark.slow
def test_uneven_slices_equal_one_process_over_fifty_steps(tmp_path: Path, cluster: Cluster) -> None:
    job = mlp_job(tmp_path, steps=50, test_rows=37)
    outcomes = cluster.run(job, (24, 8), accumulate=(2, 1))
    assert [outcome.state for outcome in outcomes] == [AttemptState.DONE] * 2, outcomes
    assert_equal_to_plain_torch(job, curve(cluster.ranks[0]), weights(job))
    assert [outcome.samples for outcome in outcomes] == [1500, 1500]
    assert [outcome.usage.samples for outcome in outcomes if outcome.usage] == [1125, 375]
    assert sum(outcome.usage.samples for outcome in outcomes if outcome.usage) == 1500
    assert outcomes[0].metrics["accuracy"] == outcomes[1].metrics["accuracy"]
    alone, _ = job.run_here()
    assert outcomes[0].metrics["test_loss"] == pytest.approx(alone.metrics["test_loss"], abs=1e-4)
    assert metrics_of(cluster.ranks[1].records()) == []  # one rank tells the curve


@pytest.mark.slow
def test_a_rank_without_rows_takes_part(tmp_path: Path, cluster: Cluster) -> None:
    job = mlp_job(tmp_path, steps=15, norm=True)
    outcomes = cluster.run(job, (0, 32))
    assert [outcome.state for outcome in outcomes] == [AttemptState.DONE] * 2, outcomes
    losses, expected = plain_torch(job)
    assert np.allclose(curve(cluster.ranks[0]), losses, atol=1e-5)
    trained = weights(job)  # written by the rank that never saw a row, running statistics included
    assert torch.allclose(trained["norm.running_var"], expected["norm.running_var"], atol=1e-4)
    assert outcomes[0].usage is not None and outcomes[0].usage.samples == 0


@pytest.mark.slow
def test_fp16_on_the_wire_halves_the_bytes_and_stays_close(tmp_path: Path, cluster: Cluster) -> None:
    job = mlp_job(tmp_path, steps=30)
    plain = cluster.run(job, (20, 12), fence=1)
    half = cluster.run(mlp_job(tmp_path / "half", steps=30), (20, 12), fence=2, compression="fp16")
    assert [outcome.state for outcome in half] == [AttemptState.DONE] * 2, half
    assert np.allclose(curve(cluster.ranks[0]), curve(cluster.ranks[2]), atol=0.02)
    assert half[0].usage is not None and plain[0].usage is not None
    assert half[0].usage.bytes_sent < 0.7 * plain[0].usage.bytes_sent


@pytest.mark.slow
def test_a_killed_peer_leaves_a_held_step_from_which_one_rank_goes_on_alone(tmp_path: Path, cluster: Cluster) -> None:
    job = mlp_job(tmp_path, steps=120, code={"model.py": SLOW_MLP})
    survivor, victim = cluster.start(job, (20, 12))
    survivor.wait_until(stepping(20))
    victim.process.kill()
    held = survivor.outcome(20)
    assert held.state is AttemptState.FAILED
    assert held.fault is not None
    assert (held.fault.reason, held.fault.blame, held.fault.retryable) == (Reason.PEER_LOST, Blame.NETWORK, True)
    assert held.held_step == held.step
    assert 20 <= held.step < 120
    assert held.samples == sum(metric for metric in [metrics_of(survivor.records())[-1]["samples"]])

    (alone,) = cluster.start(job, (32,), fence=2)
    done = alone.outcome()
    assert done.state is AttemptState.DONE, done.fault
    assert metrics_of(alone.records())[0]["step"] == held.step + 1
    expected, _ = plain_torch(job)
    assert np.allclose(curve(survivor) + curve(alone), expected, atol=1e-5)
    assert done.samples == metrics_of(alone.records())[-1]["samples"] == 12 * 300


@pytest.mark.slow
def test_a_hold_unblocks_a_rank_whose_peer_is_frozen(tmp_path: Path, cluster: Cluster) -> None:
    job = mlp_job(tmp_path, steps=100_000, code={"model.py": SLOW_MLP})
    survivor, frozen = cluster.start(job, (16, 16), collective_timeout_s=60.0)
    survivor.wait_until(stepping(5))
    os.kill(frozen.process.pid, signal.SIGSTOP)
    asked = time.monotonic()
    survivor.say("hold")
    held = survivor.outcome(20)
    assert time.monotonic() - asked < 2.0
    assert held.state is AttemptState.FAILED and held.fault is not None and held.fault.retryable
    assert held.held_step == held.step >= 5


@pytest.mark.slow
@pytest.mark.parametrize("drawn", ["alike", "apart"])
def test_all_ranks_begin_with_the_values_of_rank_0(tmp_path: Path, cluster: Cluster, drawn: str) -> None:
    """They are sent only where ranks have drawn different ones."""
    code = SLOW_MLP.replace("hidden=16", "hidden=4096")
    if drawn == "apart":
        code = code.replace("def build(", "import os\n\n\ndef build(").replace(
            "    return Net(", "    torch.manual_seed(os.getpid())\n    return Net("
        )
    job = mlp_job(tmp_path, steps=60, code={"model.py": code})
    ranks = cluster.start(job, (16, 16))
    ranks[0].wait_until(stepping(2))
    for rank in ranks:
        rank.say("pause")
    for rank in ranks:
        assert (fault := rank.outcome(20).fault) is not None and fault.reason is Reason.PAUSED_BY_USER
    held = [{path.parent.name: path for path in (job.folder / node / "checkpoints").rglob("model.safetensors")}
            for node in ("node0", "node1")]  # fmt: skip
    common = held[0].keys() & held[1].keys()
    assert common
    for name in common:
        one, other = (safetensors.torch.load_file(found[name]) for found in held)
        assert all(torch.equal(one[key], other[key]) for key in one)
    began, later = metrics_of(ranks[0].records())[:2]
    sent_bytes = sum(tensor.nbytes for tensor in one.values())
    step_bytes = later["bytes_sent"] - began["bytes_sent"]
    assert (began["bytes_sent"] - step_bytes > 0.9 * sent_bytes) is (drawn == "apart")


@pytest.mark.slow
def test_a_newcomer_and_a_laggard_receive_the_state_of_the_highest_step(tmp_path: Path, cluster: Cluster) -> None:
    job = mlp_job(tmp_path, steps=60, code={"model.py": SLOW_MLP})
    first, second = cluster.start(job, (16, 16))
    first.wait_until(stepping(10))
    first.say("pause")
    second.say("pause")
    held = [first.outcome(20), second.outcome(20)]
    assert {outcome.fault.reason for outcome in held if outcome.fault} == {Reason.PAUSED_BY_USER}
    highest = max(outcome.step for outcome in held)
    for folder in (job.folder / "node0" / "checkpoints").iterdir():  # node0 comes back without its disk
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    again = cluster.start(job, (10, 22), fence=2)
    outcomes = [rank.outcome() for rank in again]
    assert [outcome.state for outcome in outcomes] == [AttemptState.DONE] * 2, outcomes
    assert metrics_of(again[0].records())[0]["step"] in {highest + 1, held[1].step + 1}
    expected, _ = plain_torch(job)
    resumed = curve(again[0])
    assert np.allclose(resumed, expected[-len(resumed) :], atol=1e-5)


@pytest.mark.slow
def test_ranks_that_read_different_data_are_told_apart(tmp_path: Path, cluster: Cluster) -> None:
    job, other = mlp_job(tmp_path / "a", steps=5), mlp_job(tmp_path / "b", steps=5, rows=299)
    ranks = [
        Rank(job, cluster.store.port, "node0", job.task(0, (16, 16))),
        Rank(other, cluster.store.port, "node1", other.task(1, (16, 16))),
    ]
    cluster.ranks += ranks
    for outcome in (rank.outcome() for rank in ranks):
        assert outcome.fault is not None and outcome.fault.reason is Reason.DATA_UNUSABLE
        assert "rank 1" in outcome.fault.message


@pytest.mark.slow
def test_a_peer_that_never_arrives_ends_the_rendezvous_at_its_deadline(tmp_path: Path, cluster: Cluster) -> None:
    job = mlp_job(tmp_path, steps=5)
    rank = Rank(job, cluster.store.port, "node0", job.task(0, (16, 16), deadline_s=1.0))
    cluster.ranks.append(rank)
    outcome = rank.outcome(20)
    assert outcome.fault is not None and outcome.fault.reason is Reason.PEER_LOST
    assert outcome.held_step is None


@pytest.mark.slow
def test_a_group_that_does_not_form_reports_what_the_node_already_holds(tmp_path: Path, cluster: Cluster) -> None:
    job = mlp_job(tmp_path, steps=400)
    paused, _ = job.run_here("node0", stop_at_step=1)
    assert paused.held_step
    rank = Rank(job, cluster.store.port, "node0", job.task(0, (16, 16), fence=2, deadline_s=60.0), "1")
    cluster.ranks.append(rank)
    rank.wait_until(lambda _: cluster.store.check(["fence-2/device/0"]))
    rank.say("hold")  # ends a rendezvous whose peer never arrives, long before its deadline
    outcome = rank.outcome(10)
    assert outcome.held_step == paused.held_step
    assert outcome.samples == paused.samples


@pytest.mark.slow
def test_the_norms_of_an_exported_model_are_averaged_as_those_of_its_source(tmp_path: Path, cluster: Cluster) -> None:
    """A graph has no modules of a norm's class any more."""
    job = mlp_job(tmp_path, steps=10, test_rows=37, norm=True)
    module = build(job.spec.model, job.folder / "code", None, 0)
    rows = torch.export.Dim("rows", min=1, max=4096)
    exported = torch.export.export(module, (torch.zeros(4, 8),), dynamic_shapes=({0: rows},))
    torch.export.save(exported, job.folder / "code" / "net.pt2")
    graph = Job(tmp_path, {**job.document, "model": {"source": "net.pt2"}}, {}, job.data, job.test)
    from_source, from_graph = cluster.run(job, (20, 12), 1), cluster.run(graph, (20, 12), 2)
    assert [outcome.state for outcome in (*from_source, *from_graph)] == [AttemptState.DONE] * 4, from_graph
    assert from_graph[0].metrics["test_loss"] == pytest.approx(from_source[0].metrics["test_loss"], abs=1e-5)
    trained, expected = weights(job, attempt="2"), weights(job, attempt="1")
    assert all(
        torch.allclose(trained[name], expected[name], atol=1e-5) for name in ("norm.running_mean", "norm.running_var")
    )
