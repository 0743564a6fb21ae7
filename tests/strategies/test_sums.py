"""Sums over the ranks of a group: gathered where they are small, around a ring otherwise, and alike either way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo_threads import among
from torch import Tensor, nn

from strategies.faults_torch import PeerLost
from strategies.group_torch import Group
from strategies.stage_sync_torch import StageSync
from strategies.sums_torch import Sum


def drawn(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank), dtype=dtype)


def given(rank: int) -> dict[str, Tensor]:
    grid = drawn(rank, 20, 30)
    return {
        "small": drawn(rank, 1_000),
        "large": drawn(rank, 100_000),
        "float64": drawn(rank, 3, dtype=torch.float64),
        "float16": drawn(rank, 64).half(),
        "int64": torch.arange(7) * (rank + 1) * 2**40,
        "one number": drawn(rank, 1).reshape(()),
        "nothing": torch.empty(0),
        "in another order in memory on one rank": grid.t().contiguous().t() if rank else grid.clone(),
        "columns": grid[:, ::2],
        "many columns": drawn(rank, 300, 800)[:, ::2],
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sum_is_that_of_a_ring_and_the_same_to_the_bit_on_every_rank(ranks: int) -> None:
    def sums(group: Group) -> dict[str, tuple[Tensor, Tensor, bool]]:
        found = {}
        for kind, tensor in given(group.rank).items():
            ring = tensor.clone(memory_format=torch.contiguous_format)
            group.backend.allreduce([ring]).wait()
            total = Sum(group.backend, tensor)
            total.run()
            found[kind] = tensor, ring, total.parts is not None
        return found

    found: list[Any] = among(ranks, sums)
    for kind, (first, ring, gathered) in found[0].items():
        assert gathered is (kind not in ("large", "many columns"))
        assert all(torch.equal(each[kind][0], first) for each in found), kind
        assert torch.allclose(first, ring, rtol=1e-5 if first.dtype != torch.float16 else 1e-2, atol=1e-6), kind


def test_a_sum_says_what_it_sends() -> None:
    def sends(group: Group) -> list[int]:
        return [Sum(group.backend, torch.zeros(count)).sends_bytes for count in (75, 75_000)]

    assert among(3, sends) == [[600, 400_000]] * 3


def test_the_tensor_is_left_alone_until_it_is_waited_for() -> None:
    def start(group: Group) -> list[Tensor]:
        tensor = drawn(group.rank, 100)
        pending = group.start_all_reduce(tensor)
        group.barrier()
        before = tensor.clone()
        pending.wait()
        return [before, tensor]

    found: list[Any] = among(2, start)
    for rank, (before, after) in enumerate(found):
        assert torch.equal(before, drawn(rank, 100))
        assert torch.equal(after, drawn(0, 100) + drawn(1, 100))


class Stage(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.own = nn.Linear(width, width)
        self.tied = nn.Parameter(torch.zeros(width, 3))
        self.unused = nn.Parameter(torch.zeros(2))
        self.register_buffer("mean", torch.zeros(width))


@pytest.mark.parametrize("width", [16, 300])  # gathered, and around a ring
def test_replicas_of_a_stage_have_the_same_gradients_to_the_bit(width: int) -> None:
    """Of the tied weight, one replica has them in another order in memory; of `unused`, only one has any."""
    shares = (0.75, 0.25)

    def step(group: Group) -> list[Tensor | None]:
        stage = Stage(width)
        sync = StageSync(group, stage, group.backend, {"tied": group.backend})
        sync.begin()
        stage.own.weight.grad = drawn(group.rank, width, width)
        stage.own.bias.grad = drawn(group.rank, width)
        tied = drawn(group.rank, width, 3)
        stage.tied.grad = tied.t().contiguous().t() if group.rank else tied
        if group.rank:
            stage.unused.grad = torch.ones(2)
        stage.mean.copy_(drawn(group.rank, width))
        loss = sync.finish(1.0 + group.rank, shares[group.rank], last_stage=True)
        return [*(parameter.grad for parameter in stage.parameters()), stage.mean, loss]

    found: list[Any] = among(2, step)
    tied, unused, weight, bias, mean, loss = found[0]
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))
    assert torch.allclose(weight, drawn(0, width, width) + drawn(1, width, width), atol=1e-6)
    assert torch.allclose(bias, drawn(0, width) + drawn(1, width), atol=1e-6)
    assert torch.allclose(tied, drawn(0, width, 3) + drawn(1, width, 3), atol=1e-6)
    assert torch.equal(unused, torch.ones(2)) and float(loss) == 3.0
    assert torch.allclose(mean, 0.75 * drawn(0, width) + 0.25 * drawn(1, width), atol=1e-6)


def test_a_stage_whose_replica_is_gone_has_lost_a_peer() -> None:
    def step(group: Group) -> None:
        group.barrier()
        if group.rank:
            return
        group.set_deadline(0.2)
        stage = nn.Linear(4, 4)
        StageSync(group, stage, group.backend, {}).finish(0.0, 1.0, last_stage=True)

    lost, _ = among(2, step)
    assert isinstance(lost, PeerLost)
