"""Two ranks of one job on one node: a real daemon and real training, against a coordinator that the test speaks for."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from test_daemon import Coordinator, Owner, owner

from coordinator.blobs import BlobStore
from coordinator.rendezvous import Rendezvous
from node.runner import ENTRY
from protos import documents, jobspec
from protos.artifact import FileEntry, Manifest
from protos.gen import membership_pb2 as pb
from protos.gen import work_pb2
from protos.ids import Fence, JobId
from protos.states import AttemptState, StopMode
from protos.work import Outcome, Task, TaskKind
from strategies import checkpoint_torch

JOB = JobId("j-aaaaaaaa")
MODEL = """import hashlib
import time

import torch


class Net(torch.nn.Module):
    '''Says which weights it has, every time it is asked.'''

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)

    def forward(self, x):
        time.sleep(0.005)
        weights = [tensor.detach().numpy().tobytes() for _, tensor in sorted(self.state_dict().items())]
        print('weights', hashlib.sha256(b''.join(weights)).hexdigest())
        return self.layer(x.flatten(1).float())


def build():
    return Net()
"""
SPEC = jobspec.parse(
    {
        "model": {"source": "model.py:build"},
        "data": {"source": "builtin:digits"},
        "train": {"batch_size": 32, "steps": 150, "evaluate_every": "end"},
    }
)


class Ranks:
    """The coordinator of two ranks: it answers their rendezvous and keeps what each has said."""

    def __init__(self, made: Owner, code: Manifest) -> None:
        self.far: Coordinator = made.coordinator
        self._code = code
        self._rendezvous = Rendezvous(lambda job_id, fence: True)
        self._writing = asyncio.Lock()
        self.printed: dict[int, list[str]] = {0: [], 1: []}
        self.outcomes: dict[tuple[int, int], Outcome] = {}
        self.states: set[tuple[int, int, AttemptState]] = set()
        self.more = asyncio.Condition()

    async def offer(self, fence: int) -> None:
        for rank in (0, 1):
            task = Task(
                TaskKind.TRAIN, JOB, Fence(fence), rank, 2, "data_parallel", SPEC, (20, 12),
                device=rank, ranks_here=2, network="loopback", code=self._code,
            )  # fmt: skip
            offer = work_pb2.Offer(task_json=documents.encode(task), ttl_s=5.0)
            await self.say(offer=offer)

    async def say(self, **body: Any) -> None:
        async with self._writing:
            await self.far.say(**body)

    async def answer(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            call = await self.far.hear("store_call")
            tasks.create_task(self._answer(call))

    async def _answer(self, call: work_pb2.StoreCall) -> None:
        value, number = await self._rendezvous.call(
            JobId(call.job_id), Fence(call.fence), call.operation, list(call.keys), call.value, call.expected,
            call.amount, call.deadline_s, str(call.call_id),
        )  # fmt: skip
        reply = work_pb2.StoreReply(call_id=call.call_id, status="ok", value=value, number=number)
        await self.say(store_reply=reply)

    async def listen(self) -> None:
        while True:
            durable: pb.Durable = await self.far.hear("durable")
            async with self.more:
                if durable.WhichOneof("body") == "logs":
                    self.printed[durable.rank] += durable.logs.lines
                elif durable.WhichOneof("body") == "report":
                    self.states.add((durable.fence, durable.rank, AttemptState(durable.report.state)))
                    if durable.report.outcome_json:
                        outcome = documents.decode(Outcome, durable.report.outcome_json)
                        self.outcomes[durable.fence, durable.rank] = outcome
                self.more.notify_all()

    async def both(self, fence: int, state: AttemptState) -> None:
        wanted = {(fence, rank, state) for rank in (0, 1)}
        async with self.more:
            await self.more.wait_for(lambda: wanted <= self.states or len(self.outcomes) == 2 * fence)
        assert wanted <= self.states, self.outcomes


@pytest.mark.slow
def test_two_ranks_of_one_node_train_hold_and_go_on_as_one_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 both ranks meet and train 2 one stop reaches both, each writes its state into the folder they share 3 the next
    group of both goes on from there 4 both end with the weights that were delivered."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    async def main() -> None:
        async with asyncio.timeout(120), owner(tmp_path, entry=ENTRY) as made:
            far = made.coordinator
            await far.hear("capacity_json", lambda document: b"loopback" in document)
            blobs = BlobStore(tmp_path / "blobs")
            digest = await blobs.put_bytes(MODEL.encode())
            ranks = Ranks(made, Manifest((FileEntry("model.py", digest, len(MODEL.encode())),)))
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(ranks.answer(tasks)), tasks.create_task(ranks.listen())]
                await ranks.offer(1)
                await ranks.both(1, AttemptState.RUNNING)
                stop = work_pb2.Stop(job_id=JOB, fence=1, mode=StopMode.HOLD, reason="a peer was lost")
                await ranks.say(stop=stop)
                await ranks.both(1, AttemptState.FAILED)
                held = [ranks.outcomes[1, rank].held_step or 0 for rank in (0, 1)]
                assert min(held) > 0 and abs(held[0] - held[1]) <= 1
                checkpoints = made.home / "node" / "jobs" / JOB / "checkpoints"
                found = checkpoint_torch.newest(checkpoints, checkpoint_torch.spec_digest(SPEC))
                assert (found.step, found.skipped) == (max(held), ())
                assert all(path.name.startswith("step-") for path in checkpoints.iterdir()), "something is left behind"

                await ranks.offer(2)
                await ranks.both(2, AttemptState.DONE)
                for task in background:
                    task.cancel()
            first, second = (ranks.outcomes[2, rank] for rank in (0, 1))
            assert (first.step, first.samples) == (second.step, second.samples)
            assert first.step == 150
            assert first.usage is not None and second.usage is not None
            assert first.usage.steps == second.usage.steps == 150 - max(held)
            before = max(ranks.outcomes[1, rank].samples for rank in (0, 1))
            assert first.usage.samples + second.usage.samples == first.samples - before, "each took its own slices"
            (artifact,) = first.artifacts
            weights = safetensors.numpy.load(await blobs.read_bytes(artifact.digest))
            delivered = hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest()
            assert [lines[-1] for lines in ranks.printed.values()] == [f"weights {delivered}"] * 2

    asyncio.run(main())
