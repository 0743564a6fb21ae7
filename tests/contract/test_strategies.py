"""N nodes = 1 node, for every strategy and every kind of model: the losses and weights of plain torch, by ranks that
have all worked. Batch norms see the rows of one micro-batch of one replica, so their reference does too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from engine_harness import Job, Rank, metrics_of
from strategy_jobs import BATCH, MODELS, ROWS, STEPS, Pieces, Reference, by_hand, job_of, whole

from protos.plan import Layout, Schedule
from protos.states import AttemptState
from protos.work import Outcome, Task, Usage
from strategies.batches_torch import bounds_of
from strategies.checkpoint_name import CheckpointName, parse_folder
from strategies.sample_order import slice_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

TOLERANCE = 1e-4
MEMORY_BYTES = 8 << 30  # granted to each rank, and room for any of these models
CUTS = {  # first into two stages, then into three of unlike size
    "mlp": (("3",), ("0", "5")),
    "cnn": (("2",), ("0", "4")),
    "gpt": (("blocks.0",), ("blocks.0.norm2", "blocks.2")),
    "lstm": (("first",), ("into", "second")),
    "minilm": (
        ("bert.encoder.layer.2.output.LayerNorm",),
        ("bert.encoder.layer.0.output.LayerNorm", "bert.encoder.layer.3.attention.output.LayerNorm"),
    ),
}


@dataclass(frozen=True)
class Strategy:
    """`samples` of each replica, `pieces` each cuts them into; the layout may depend on the model."""

    name: str
    samples: tuple[int, ...]
    pieces: tuple[int, ...]
    layout: Layout | None = None
    stages: int = 1
    replicas: int = 1

    def layout_of(self, model: str) -> Layout | None:
        if self.stages == 1:
            return self.layout
        cut_after = CUTS[model][self.stages - 2]
        kind = Schedule.GPIPE if self.stages == 3 else Schedule.ONE_F_ONE_B
        return Layout(tuple((s, s + 1) for s in range(self.stages)), cut_after, self.replicas, kind)

    @property
    def world_size(self) -> int:
        if self.stages > 1:
            return self.stages * self.replicas
        return len(self.samples) * (self.layout.tensor if self.layout else 1)

    def micro_batches(self, rows: int) -> list[list[tuple[int, int]]]:
        """Of a global batch, as the strategy defines them: all that batch norms can see."""
        found = []
        for replica, pieces in enumerate(self.pieces):
            start, stop = slice_of(rows, self.samples, replica)
            size = -(-self.samples[replica] // pieces)
            bounds = [*range(start, stop, size), stop] if self.stages > 1 else bounds_of(start, stop, pieces)
            found.append(list(pairwise(bounds)))
        return found

    def rows_of(self, rank: int) -> int:
        """What rank `rank` computes on in the whole run."""
        replica = rank // self.stages if self.world_size > len(self.samples) else rank
        replica = 0 if self.layout is not None and self.layout.tensor > 1 else replica
        rows = [min(BATCH, ROWS - first) for first in range(0, ROWS, BATCH)]
        slices = [slice_of(rows[step % len(rows)], self.samples, replica) for step in range(STEPS)]
        return sum(stop - start for start, stop in slices)


REFUSED = {("lstm", "tensor over 2"): r"no layer of the model can be cut over 2 ranks; looked at: into .*, head"}
ONE = ((0, 1),)
STRATEGIES = [
    Strategy("single_node accumulating", (24,), (3,)),
    Strategy("single_node recomputing", (24,), (2,), Layout(ONE, checkpoint_activations=True)),
    Strategy("data_parallel", (17, 7), (3, 1)),
    Strategy("pipeline of 2", (24,), (4,), stages=2),
    Strategy("pipeline of 3", (24,), (5,), stages=3),
    Strategy("pipeline of 2 x 2", (15, 9), (2, 2), stages=2, replicas=2),
    Strategy("sharded over 2", (15, 9), (2, 1), Layout(ONE, sharded=True)),
    Strategy("sharded over 3", (12, 9, 3), (1, 2, 1), Layout(ONE, sharded=True)),
    Strategy("tensor over 2", (24,), (1,), Layout(ONE, tensor=2)),
]
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}


class Ran:
    """What the ranks of one group left behind."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self._ranks = ranks
        try:
            self.outcomes = [rank.outcome(120.0) for rank in ranks]
        finally:
            for rank in ranks:
                rank.end()

    @property
    def losses(self) -> list[float]:
        return [metric["loss"] for metric in metrics_of(self._ranks[0].records())]

    @property
    def model(self) -> Path:
        (record,) = [record for record in self._ranks[0].records() if record["kind"] == "artifact"]
        return Path(record["path"])

    def remove(self) -> None:
        """What lies on the ranks' disks: hundreds of megabytes for a model of real size."""
        for rank in self._ranks:
            rank.remove()

    def part(self, rank: int) -> CheckpointName | None:
        """The newest state that this rank has kept."""
        folder = self._kept(rank)
        return parse_folder(folder.name) if folder else None

    def part_bytes(self, rank: int) -> int:
        """Of the weights in it."""
        folder = self._kept(rank)
        assert folder is not None
        return bytes_of(safetensors.torch.load_file(folder / "model.safetensors"))

    def _kept(self, rank: int) -> Path | None:
        """A newer one than the last that was announced may lie there, in whose favour that one is gone."""
        announced = [Path(each["folder"]) for each in self._ranks[rank].records() if each["kind"] == "checkpoint"]
        if not announced:
            return None
        part = parse_folder(announced[-1].name)
        there = [(name, folder) for folder in announced[-1].parent.iterdir() if (name := parse_folder(folder.name))]
        mine = [(name.step, folder) for name, folder in there if part is not None and name.part == part.part]
        return max(mine)[1] if mine else None


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Bench:
    """The jobs and the references, each worked out once."""

    def __init__(self, folder: Path) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self._folder = folder
        self._jobs: dict[str, Job] = {}
        self._references: dict[tuple[str, Pieces], Reference] = {}

    def job(self, model: str) -> Job:
        if model not in self._jobs:
            self._jobs[model] = job_of(self._folder / model, model)
        return self._jobs[model]

    def reference(self, model: str, strategy: Strategy) -> Reference:
        pieces = strategy.micro_batches if model == "cnn" else whole
        if (model, pieces) not in self._references:
            self._references[model, pieces] = by_hand(self.job(model), pieces)
        return self._references[model, pieces]

    def tasks(self, model: str, strategy: Strategy) -> list[Task]:
        job, layout = self.job(model), strategy.layout_of(model)
        tasks = []
        for rank in range(strategy.world_size):
            replica = layout.replica_of(rank) if layout is not None and strategy.stages > 1 else rank
            pieces = strategy.pieces[min(replica, len(strategy.pieces) - 1)]
            if model == "minilm" and layout is not None and layout.sharded:
                pieces = 1  # every piece gathers the whole model anew
            fence = 1 + STRATEGIES.index(strategy) + len(STRATEGIES) * MODELS.index(model)
            task = job.task(rank, strategy.samples, fence, accumulate=pieces, layout=layout)
            tasks.append(replace(task, world_size=strategy.world_size, strategy=strategy.name.partition(" ")[0]))
        return tasks

    def run(self, model: str, strategy: Strategy) -> Ran:
        job, tasks, attempt = self.job(model), self.tasks(model, strategy), strategy.name.replace(" ", "-")
        # every rank of every case is on a node of its own
        ranks = [
            Rank(job, self._store.port, f"{attempt}-{rank}", task, memory_bytes=MEMORY_BYTES)
            for rank, task in enumerate(tasks)
        ]
        return Ran(ranks)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("strategies"))


@pytest.mark.parametrize("strategy", BY_NAME)
@pytest.mark.parametrize("model", MODELS)
def test_many_ranks_learn_what_plain_torch_does_on_one(bench: Bench, model: str, strategy: str) -> None:
    chosen = BY_NAME[strategy]
    ran = bench.run(model, chosen)
    if (model, strategy) in REFUSED:
        assert [outcome.state for outcome in ran.outcomes] == [AttemptState.FAILED] * chosen.world_size
        faults = [outcome.fault for outcome in ran.outcomes if outcome.fault is not None]
        assert all(re.search(REFUSED[model, strategy], fault.message) and fault.hint for fault in faults), faults
        return
    assert [outcome.state for outcome in ran.outcomes] == [AttemptState.DONE] * chosen.world_size, ran.outcomes
    reference = bench.reference(model, chosen)
    assert ran.losses == pytest.approx(reference.losses, abs=TOLERANCE)
    trained = safetensors.torch.load_file(ran.model)
    for name, tensor in reference.state.items():
        if not tensor.is_floating_point():
            continue  # how many batches a norm has seen: each micro-batch is one
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=TOLERANCE)
    assert_everyone_worked(chosen, ran, reference.modules)
    ran.remove()


def assert_everyone_worked(strategy: Strategy, ran: Ran, modules: set[str]) -> None:
    """No strategy has quietly become another one: rows, layers, parts and bytes of every rank."""
    used = [usage_of(outcome) for outcome in ran.outcomes]
    assert [usage.samples for usage in used] == [strategy.rows_of(rank) for rank in range(strategy.world_size)]
    assert all(usage.steps == STEPS for usage in used)
    assert all((usage.bytes_sent > 0) == (strategy.world_size > 1) for usage in used)
    kept = [ran.part(rank) for rank in range(strategy.world_size)]
    parts = [(name.part, name.parts) if name is not None else None for name in kept]
    if strategy.stages > 1:
        held = [set(usage.holds) for usage in used]
        assert all(held[rank] == held[rank % strategy.stages] for rank in range(strategy.world_size))
        assert all(own - other for own, other in pairs(held[: strategy.stages]))
        assert set.union(*held) == modules
        assert parts[: strategy.stages] == [(stage, strategy.stages) for stage in range(strategy.stages)]
    elif strategy.layout is not None and strategy.world_size > 1:
        assert parts == [(rank, strategy.world_size) for rank in range(strategy.world_size)]
        whole_bytes = bytes_of(safetensors.torch.load_file(ran.model))
        assert all(ran.part_bytes(rank) < whole_bytes for rank in range(strategy.world_size))
    else:
        assert all(usage.holds == () for usage in used)


def usage_of(outcome: Outcome) -> Usage:
    assert outcome.usage is not None
    return outcome.usage


def pairs(held: Sequence[set[str]]) -> Iterator[tuple[set[str], set[str]]]:
    return ((a, b) for a in held for b in held if a is not b)
