"""Two stages whose nodes upload at unequal speeds: real ranks, real folders, the coordinator's own book of parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from engine_harness import Job, Rank
from engine_jobs import gpt_job
from test_pipeline_ranks import SLOW_GPT

from coordinator.checkpoints import with_uploaded
from protos.artifact import Manifest
from protos.ids import Fence
from protos.plan import Layout
from protos.states import AttemptState
from protos.work import Checkpoint, Checkpoints
from strategies.checkpoint_name import parse_folder

EVERY_S = 0.1
UPLOAD_S = (0.02, 0.35)  # the second rank needs more than three intervals

pytestmark = pytest.mark.slow


@pytest.fixture
def ended(tmp_path: Path) -> Iterator[list[Rank]]:
    made = gpt_job(tmp_path, steps=60)
    document = {**made.document, "checkpoint": {"every_s": EVERY_S}}
    job = Job(made.folder, document, {"model.py": SLOW_GPT}, made.data)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    layout = Layout(((0, 1), (1, 2)), ("blocks.0",))
    ranks = []
    for rank, upload_s in enumerate(UPLOAD_S):
        task = job.task(rank, (24,), 1, world_size=2, layout=layout, accumulate=3)
        ranks.append(Rank(job, store.port, f"node{rank}", task, "1", upload_s=upload_s))
    assert [rank.outcome().state for rank in ranks] == [AttemptState.DONE] * 2
    yield ranks
    for rank in ranks:
        rank.end()


def announced(rank: Rank) -> list[dict[str, Any]]:
    return [record for record in rank.records() if record["kind"] == "checkpoint"]


def test_each_set_of_parts_that_is_uploaded_is_whole_although_one_node_is_slow(ended: list[Rank]) -> None:
    quick, slow = ([record["step"] for record in announced(rank)] for rank in ended)
    assert quick[: len(slow)] == slow and len(quick) - len(slow) <= 1 and len(slow) >= 2
    assert not any(record["refused"] for rank in ended for record in announced(rank)), "a node would have let it be"
    known = Checkpoints()
    for step in slow:
        for folder in (Path(record["folder"]) for rank in ended for record in announced(rank)):
            name = parse_folder(folder.name)
            assert name is not None
            if name.step == step:
                part = Checkpoint(step, 24 * step, Manifest(()), Fence(name.fence), name.part, name.parts)
                known = with_uploaded(known, part)
        assert known.newest is not None and known.newest.step == step
