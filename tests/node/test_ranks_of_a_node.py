"""What the ranks of one job share on a node: its cores, its GPUs, the folder of checkpoints."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from node_bench import make_task, run_async

from node.attempt import Place
from node.cache import BlobCache
from node.workspace import Workspaces
from protos.artifact import FileEntry, Manifest, digest_bytes
from protos.capacity import Capacity, DeviceInfo, TrustedNetwork
from protos.errors import Conflict
from protos.ids import Digest
from protos.work import Resume, Task

STATE = b"{}"
LAN = "10.0.0.0/8"


def place(cores: float, *gpus: int) -> Place:
    devices = tuple(DeviceInfo("cuda", index, "T4", 1, 1, 0.0) for index in gpus)
    networks = (TrustedNetwork("loopback", "lo", "127.0.0.1"), TrustedNetwork("10.0.0.0/8", "eth0", "10.0.0.7"))
    capacity = Capacity("h", "m", "", "", cores, 8, 1, 1, 1, gpus=devices, networks=networks)
    return Place.of(replace(make_task("returns"), network="10.0.0.0/8"), "box", capacity)


def rank(device: int = 0, ranks_here: int = 1) -> Task:
    return replace(make_task("returns"), device=device, ranks_here=ranks_here)


def test_each_rank_gets_its_own_of_the_granted_gpus() -> None:
    here = place(8.0, 1, 3)
    assert here.interface == "10.0.0.7"
    assert [here.device(rank(device, 2)) for device in (0, 1)] == ["cuda:1", "cuda:3"]
    assert place(8.0).device(rank()) == "cpu"


def test_a_gpu_that_went_away_since_the_plan_is_said_and_no_other_rank_is_crowded() -> None:
    with pytest.raises(Conflict, match="box has 1 GPUs now, too few for the plan's number 1"):
        place(8.0, 0).device(rank(1, 2))


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(8.0, 1, 8), (8.0, 2, 4), (7.0, 2, 4), (0.25, 1, 1), (2.0, 8, 1)]
)
def test_the_ranks_of_a_node_share_its_cores(cores: float, ranks: int, threads: int) -> None:
    assert place(cores).threads(rank(ranks_here=ranks)) == threads


@pytest.mark.parametrize(
    ("cap", "ranks", "network", "share"),
    [(8e6, 1, LAN, 8e6), (8e6, 4, LAN, 2e6), (8e6, 2, "loopback", None), (None, 2, LAN, None)],
)
def test_the_ranks_of_a_node_share_the_upload_its_owner_allows(
    cap: float | None, ranks: int, network: str, share: float | None
) -> None:
    task = replace(rank(ranks_here=ranks), network=network)
    assert replace(place(8.0), max_upload_bytes_per_s=cap).upload_bytes_per_s(task) == share
    capacity = Capacity("h", "m", "", "", 8.0, 8, 1, 1, 1, max_upload_bytes_per_s=cap)
    assert Place.of(task, "box", capacity).max_upload_bytes_per_s == cap


def test_ranks_that_fetch_the_same_checkpoint_at_once_both_find_it(tmp_path: Path) -> None:
    asked: list[Digest] = []

    async def body() -> None:
        both_asked = asyncio.Event()

        async def fetch(digest: Digest, destination: Path, n_bytes: int) -> None:
            asked.append(digest)
            await both_asked.wait()
            destination.write_bytes(STATE)

        workspaces = Workspaces(tmp_path / "jobs", BlobCache(tmp_path / "cache"), fetch)
        manifest = Manifest((FileEntry("state.json", digest_bytes(STATE), len(STATE)),))
        tasks = [replace(make_task("returns"), rank=at, world_size=2, resume=Resume(7, manifest)) for at in (0, 1)]
        preparing = [asyncio.create_task(workspaces.prepare(task)) for task in tasks]
        while not asked:  # noqa: ASYNC110 - the first file is asked for some turns of the loop later
            await asyncio.sleep(0)
        both_asked.set()
        first, second = await asyncio.gather(*preparing)
        assert first.checkpoint_dir == second.checkpoint_dir
        assert first.output_dir != second.output_dir
        assert [path.name for path in first.checkpoint_dir.iterdir()] == ["step-00000007"]
        assert (first.checkpoint_dir / "step-00000007" / "state.json").read_bytes() == STATE
        workspaces.close_attempt(tasks[0])
        assert second.output_dir.is_dir()

    run_async(body())
    assert len(asked) == 1, "one download serves both"
