"""The machine that `hive up` shares out is the one a container leaves, by files as the kernel writes them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from coordinator.local import Share, machine_share
from protos import machine_bounds

MIB = 1024**2
V2 = "31 30 0:27 / {root} rw - cgroup2 cgroup2 rw\n", "0::/box/inner\n"
V1 = (
    "32 30 0:28 /docker/abc {root}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 30 0:29 /docker/abc {root}/memory rw - cgroup cgroup rw,memory\n",
    "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n",
)


def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: tuple[str, str], files: dict[str, str]) -> None:
    """/proc/self and control groups below tmp_path."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "mountinfo").write_text(said[0].format(root=tmp_path / "groups"))
    (tmp_path / "proc" / "cgroup").write_text(said[1])
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(machine_bounds, "PROC", tmp_path / "proc")


def test_the_bounds_of_a_container_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "box/cpu.max": "60000 100000\n",  # the outer group is the tighter one
        "box/inner/cpu.max": "max 100000\n",
        "box/memory.max": "max\n",
        "box/inner/memory.max": f"{96 * MIB}\n",
    }
    kernel(tmp_path, monkeypatch, V2, files)
    assert machine_bounds.inherited_cpus() == 0.6
    assert machine_share(3) == Share(0.2, 32 * MIB)


def test_the_bounds_of_the_first_version_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "cpu/cpu.cfs_quota_us": "50000\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "memory/memory.limit_in_bytes": f"{64 * MIB}\n",
    }
    kernel(tmp_path, monkeypatch, V1, files)
    assert machine_share(2) == Share(0.25, 32 * MIB)


@pytest.mark.parametrize(
    ("said", "files"),
    [
        (V2, {"box/inner/cpu.max": "max 100000\n", "box/inner/memory.max": "max\n"}),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}),
        (V2, {}),
        (("", "not a group"), {}),
    ],
    ids=["v2", "v1", "no files", "nonsense"],
)
def test_without_a_bound_it_is_the_whole_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: tuple[str, str], files: dict[str, str]
) -> None:
    kernel(tmp_path, monkeypatch, said, files)
    assert machine_share(1) == Share(float(len(os.sched_getaffinity(0))), psutil.virtual_memory().total)
