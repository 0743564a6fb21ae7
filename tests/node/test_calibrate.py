"""The cache of calibrations and the turn to measure."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import calibrate
from node.calibration_run import calibrate_machine
from node.errands import Errands
from protos import documents
from protos.capacity import Calibration, Capacity, DeviceInfo, FamilyRate, Rate
from protos.errors import Conflict, DeadlineExceeded, SpecError
from protos.states import AttemptState
from protos.work import Outcome, Task

CAPACITY = Capacity("host", "m", "linux", "3.11", 2.0, 4, 8 << 30, 16 << 30, 1 << 40)


def calibration(speed: float = 1e9, spread: float = 0.1) -> Calibration:
    return Calibration(
        flops={"fp32": Rate(speed, speed / 2, spread)},
        memory_bandwidth=Rate(speed, speed / 2, spread),
        families={"matmul": FamilyRate(speed, 1e-3, spread)},
        torch="2.13.0",
        threads=1,
        seconds=3.0,
    )


def test_what_is_stored_is_loaded(tmp_path: Path) -> None:
    cache = calibrate.CalibrationCache(tmp_path / "calibration")
    assert cache.load("d") is None
    assert cache.store("d", calibration()) == calibration()
    assert cache.load("d") == calibration()
    assert [path.name for path in (tmp_path / "calibration").iterdir()] == ["d.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"flops": null}', b"\xff" * 10, b" " * 300_000])
def test_a_damaged_cache_is_measured_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.json").write_bytes(content)
    cache = calibrate.CalibrationCache(tmp_path)
    assert cache.load("d") is None
    cache.store("d", calibration())
    assert cache.load("d") == calibration()


def test_impossible_figures_are_neither_stored_nor_loaded(tmp_path: Path) -> None:
    cache = calibrate.CalibrationCache(tmp_path)
    bad = dataclasses.replace(calibration(), families={"conv": FamilyRate(0.0, 1e-3)})
    with pytest.raises(SpecError):
        cache.store("d", bad)
    assert list(tmp_path.iterdir()) == []


def test_merging_keeps_the_best_and_the_latest_median() -> None:
    merged = calibrate.merge(calibration(4e9), calibration(1e9))
    assert merged.flops["fp32"].best == 4e9
    assert merged.flops["fp32"].p50 == 0.5e9
    assert merged.flops["fp32"].spread == pytest.approx(3.0)  # the two runs lie 3 medians apart
    assert merged.families["matmul"].flops == 1e9
    assert merged.families["matmul"].spread == pytest.approx(3.0)


speeds = st.floats(1e3, 1e15)


@given(speeds, speeds)
def test_merged_figures_are_plausible(old: float, new: float) -> None:
    merged = calibrate.merge(calibration(old), calibration(new))
    assert calibrate.plausible(merged)
    assert merged.memory_bandwidth.best == max(old, new)


def test_apply_fills_a_capacity() -> None:
    filled = calibrate.apply(CAPACITY, calibration())
    assert filled.flops["fp32"].best == 1e9
    assert filled.families["matmul"].overhead_s == 1e-3
    assert filled.memory_bandwidth is not None
    assert filled.torch == "2.13.0"
    assert filled.cores == CAPACITY.cores


def test_the_digest_follows_what_the_figures_depend_on() -> None:
    digest = calibrate.hardware_digest(CAPACITY, "cpu", "2.13.0")
    gpu = DeviceInfo("cuda", 0, "H200", 1 << 37, 1 << 36, 0.0)
    others = [
        calibrate.hardware_digest(dataclasses.replace(CAPACITY, cores=0.25), "cpu", "2.13.0"),
        calibrate.hardware_digest(dataclasses.replace(CAPACITY, memory_bytes=1), "cpu", "2.13.0"),
        calibrate.hardware_digest(dataclasses.replace(CAPACITY, gpus=(gpu,)), "cpu", "2.13.0"),
        calibrate.hardware_digest(CAPACITY, "another cpu", "2.13.0"),
        calibrate.hardware_digest(CAPACITY, "cpu", "2.14.0"),
    ]
    assert len({digest, *others}) == 6
    busier = dataclasses.replace(CAPACITY, load=3.0, disk_free_bytes=1, hostname="renamed")
    assert calibrate.hardware_digest(busier, "cpu", "2.13.0") == digest


def test_this_machine_has_a_cpu_model_and_a_torch_version() -> None:
    assert calibrate.cpu_model()
    assert calibrate.torch_version()


async def _two_in_turn(folder: Path) -> list[str]:
    events: list[str] = []
    inside = asyncio.Event()
    leave = asyncio.Event()

    async def first() -> None:
        async with calibrate.machine_turn(10, folder):
            events.append("first in")
            inside.set()
            await leave.wait()
            events.append("first out")

    async def second() -> None:
        await inside.wait()
        with pytest.raises(DeadlineExceeded):
            async with calibrate.machine_turn(0, folder):
                events.append("never")
        leave.set()
        async with calibrate.machine_turn(10, folder):
            events.append("second in")

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(first())
        group.create_task(second())
    return events


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    assert asyncio.run(_two_in_turn(tmp_path)) == ["first in", "first out", "second in"]


def test_a_killed_process_gives_its_turn_back(tmp_path: Path) -> None:
    hold = (
        "import asyncio, sys; from pathlib import Path; from node import calibrate\n"
        "async def main():\n"
        "    async with calibrate.machine_turn(10, Path(sys.argv[1])):\n"
        "        print('held', flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    root = str(Path(calibrate.__file__).parents[1])
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, cwd=root) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(DeadlineExceeded):
                asyncio.run(_enter(tmp_path, 0))
        finally:
            process.kill()
    asyncio.run(_enter(tmp_path, 5))


async def _enter(folder: Path, deadline_s: float) -> None:
    async with calibrate.machine_turn(deadline_s, folder):
        pass


def test_a_planted_link_or_pipe_is_refused(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    lock = tmp_path / calibrate.LOCK_NAME
    lock.symlink_to(precious)
    with pytest.raises(Conflict, match="cannot be used as a lock"):
        asyncio.run(_enter(tmp_path, 0))
    assert precious.read_text() == "data"
    lock.unlink()
    lock.mkdir()
    with pytest.raises(Conflict, match="not a regular file"):
        asyncio.run(_enter(tmp_path, 0))


def test_the_module_needs_neither_torch_nor_numpy() -> None:
    check = "import sys, node.calibrate; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    root = str(Path(calibrate.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", check], cwd=root, check=False).returncode == 0


class Measuring:
    """Errands that answer with a calibration in CPU time."""

    async def run(self, task: Task, threads: int, device: str) -> Outcome:
        return Outcome(AttemptState.DONE, document=documents.encode(calibration()).decode())


@pytest.mark.parametrize(
    ("cores", "threads", "mechanism", "device", "share"),
    [
        (0.25, 1, "cgroup2", "cpu", 0.25),
        (1.5, 2, "duty_cycle", "cpu", 0.75),
        (2.0, 2, "cgroup1", "cpu", 1.0),
        (0.25, 1, "none", "cpu", 1.0),
        (0.25, 1, "cgroup2", "cuda:0", 1.0),
    ],
)
def test_what_was_measured_in_cpu_time_is_slowed_by_the_cap(
    tmp_path: Path, cores: float, threads: int, mechanism: str, device: str, share: float
) -> None:
    capacity = dataclasses.replace(CAPACITY, cores=cores, cpu_mechanism=mechanism)
    cache, errands = calibrate.CalibrationCache(tmp_path), cast(Errands, Measuring())
    found = asyncio.run(calibrate_machine(capacity, cache, errands, threads, device))
    assert found.flops["fp32"].p50 == pytest.approx(share * 0.5e9)
    assert found.memory_bandwidth.best == pytest.approx(share * 1e9)
    assert found.families["matmul"].flops == pytest.approx(share * 1e9)
    assert found.families["matmul"].overhead_s == pytest.approx(1e-3 / share)
