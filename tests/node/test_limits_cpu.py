"""The CPU cap measured for real: 0.25 cores give 0.25 CPU seconds per second, by each mechanism this machine has."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from node_bench import MakeBench, run_async

from node import cgroup, cpu_limit, process_tree
from node.cpu_limit import CpuLimit, DutyLimit
from protos import machine_bounds

pytestmark = pytest.mark.alone

SPIN = "while True: pass"
SPIN_IN_TWO_PROCESSES = "import os\nos.fork()\nwhile True: pass"


async def measured_share(limit: CpuLimit, program: str, seconds: float) -> float:
    """CPU seconds per second of a program under the limit, after it has settled."""
    command = [sys.executable, "-S", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:  # noqa: ASYNC220
        for path in limit.join:
            Path(path).write_text(str(process.pid))
        enforcing = asyncio.create_task(limit.enforce(lambda: [process.pid]))
        try:
            await asyncio.sleep(1.0)  # what it used before the limit saw it is paid back by then
            meter = process_tree.CpuMeter()
            members = process_tree.tree(process.pid)
            before_s, before_used = time.monotonic(), meter.sample(members)
            await asyncio.sleep(seconds)
            return (meter.sample(members) - before_used) / (time.monotonic() - before_s)
        finally:
            process_tree.send_signal(process_tree.tree(process.pid)[::-1], 9)
            enforcing.cancel()
            await asyncio.gather(enforcing, return_exceptions=True)
            await limit.close()


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["cgroup2", "cgroup1", "duty_cycle"])
def test_a_quarter_of_a_core_is_held_within_ten_percent_by_one_process_and_by_two(mechanism: str) -> None:
    async def scenario() -> list[float]:
        limits = [await cpu_limit.choose(0.25, os.cpu_count() or 1, among=[mechanism]) for _ in range(2)]
        if any(limit.mechanism != mechanism for limit in limits):
            pytest.skip(f"{mechanism} cannot be used here: {limits[0].reason}")
        programs = (SPIN, SPIN_IN_TWO_PROCESSES)
        return await asyncio.gather(*(measured_share(*each, 3.5) for each in zip(limits, programs, strict=True)))

    assert run_async(scenario()) == pytest.approx([0.25, 0.25], rel=0.10)


@pytest.mark.slow
def test_a_workers_own_cpu_time_is_capped(bench: MakeBench) -> None:
    async def scenario() -> float:
        async with bench(cpu_limit=DutyLimit(0.25, "asked for")) as b:
            handle, recorder = await b.start("spins")
            await recorder.ready.wait()
            before_s, before_used = time.monotonic(), process_tree.cpu_s(handle.pid)
            await asyncio.sleep(3.0)
            return float((process_tree.cpu_s(handle.pid) - before_used) / (time.monotonic() - before_s))

    assert run_async(scenario()) == pytest.approx(0.25, rel=0.10)


def test_a_worker_joins_the_group_and_the_group_goes_with_the_runner(bench: MakeBench) -> None:
    async def scenario() -> None:
        limit = await cpu_limit.choose(0.5, os.cpu_count() or 1)
        if not limit.join:
            pytest.skip(f"no control group can be made here: {limit.reason}")
        procs = Path(limit.join[0])
        async with bench(cpu_limit=limit) as b:
            handle, recorder = await b.start("starts_processes")
            pids = (await recorder.line("pids")).split()[1:]
            assert str(handle.pid) in pids
            assert sorted(procs.read_text().split()) == sorted(pids)
        assert not procs.parent.exists()

    run_async(scenario())


def test_without_a_cap_below_the_machine_nothing_is_enforced() -> None:
    async def scenario() -> None:
        for cpus in (None, 2.0, 3.0):
            limit = await cpu_limit.choose(cpus, 2.0)
            assert limit.mechanism == "none" and limit.join == ()

    run_async(scenario())


def test_the_reason_names_why_better_mechanisms_are_not_in_force() -> None:
    async def scenario() -> None:
        limit = await cpu_limit.choose(0.25, 2.0, among=[])
        assert limit.mechanism == "duty_cycle"
        limit = await cpu_limit.choose(0.25, 2.0)
        assert "0.25 cores" in limit.reason
        await limit.close()

    run_async(scenario())


def test_the_place_of_both_versions_is_read_from_proc() -> None:
    mountinfo = (
        "30 1 0:26 / /sys/fs/cgroup rw shared:4 - tmpfs tmpfs ro\n"
        "31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        "32 30 0:28 /docker/abc /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    )
    membership = "4:cpu,cpuacct:/docker/abc/inner\n1:name=systemd:/x\n0::/user.slice/app.scope\n"
    second, first = machine_bounds.find_place("cpu", mountinfo, membership)
    assert second == machine_bounds.Place(2, Path("/sys/fs/cgroup/unified/user.slice/app.scope"))
    assert first == machine_bounds.Place(1, Path("/sys/fs/cgroup/cpu,cpuacct/inner"))
    assert machine_bounds.find_place("memory", mountinfo, membership)[1] is None


def test_groups_of_dead_daemons_are_removed_and_others_left(tmp_path: Path) -> None:
    """Over plain folders: an empty group is removed by removing its folder, as here."""
    mine = tmp_path / f"hive-{os.getpid()}-{process_tree.start_ticks(os.getpid())}-0"
    reused_pid = tmp_path / f"hive-{os.getpid()}-1-0"
    foreign = tmp_path / "hive-of-someone"
    for folder in (mine, reused_pid, foreign):
        folder.mkdir()
    assert cgroup.remove_stale(tmp_path) == []  # without cgroup.procs it is no control group, and is left alone
    second, first = machine_bounds.places("cpu")
    place = next((place for place in (second, first) if place and os.access(place.folder, os.W_OK)), None)
    if place is None:
        pytest.skip("no control group can be made here")
    stale = place.folder / f"hive-{os.getpid()}-1-0"
    stale.mkdir()
    with subprocess.Popen(["sleep", "300"]) as sleeper:
        (stale / "cgroup.procs").write_text(str(sleeper.pid))
        cgroup.remove_stale(place.folder)
        assert sleeper.wait(5) == -9
    cgroup.remove_stale(place.folder)
    assert not stale.exists()
