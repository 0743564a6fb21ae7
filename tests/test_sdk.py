"""`import hive` against a real coordinator process: inside and outside a running loop."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hive
from coordinator.local import LocalCluster, Share


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("sdk")
    loop = asyncio.new_event_loop()
    cluster = LocalCluster(folder, 0, Share(1.0, 2**30))
    loop.run_until_complete(cluster.__aenter__())
    try:
        yield folder
    finally:
        loop.run_until_complete(cluster.stop())
        loop.close()


@pytest.fixture(autouse=True)
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory holds model.py; the environment means the module's coordinator."""
    for name in list(os.environ):
        if name.startswith("HIVE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HIVE_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text("def build(): ...\n")
    return tmp_path


JOB = {"name": "sdk", "model": {"source": "model.py:build"}, "data": {"source": "builtin:digits"}}


def test_a_job_from_a_dict_is_submitted_and_cancelled() -> None:
    job = hive.submit(JOB)
    assert job.id in [each["id"] for each in hive.jobs()]
    assert job.show()["name"] == "sdk"
    assert job.metrics() == []
    assert job.logs() == ""
    assert job.cancel().state == "CANCELLED"
    with pytest.raises(hive.JobFailed, match="ended CANCELLED"):
        job.wait()
    assert job.artifacts("out") == []


def test_a_job_from_a_file(here: Path) -> None:
    (here / "job.yaml").write_text("name: file\nmodel: {source: 'model.py:build'}\ndata: {source: 'builtin:digits'}\n")
    job = hive.submit(here / "job.yaml")
    assert job.show()["name"] == "file"
    job.cancel()


def test_it_works_inside_a_running_loop() -> None:
    async def work() -> list[dict[str, object]]:
        return hive.nodes()

    assert asyncio.run(work()) == []


def test_waiting_has_a_time_limit_and_the_job_goes_on() -> None:
    job = hive.submit(JOB)
    with pytest.raises(TimeoutError):
        job.wait(timeout_s=0.2)
    assert job.state not in ("FAILED", "CANCELLED")
    job.cancel()


def test_errors_are_of_the_one_tree() -> None:
    with pytest.raises(hive.NotFound):
        hive.Job("j-nothing").show()
    with pytest.raises(hive.SpecError, match="did you mean 'epochs'"):
        hive.submit({**JOB, "train": {"epoch": 1}})
    with pytest.raises(hive.NoPlacement):
        hive.plan(JOB)
    with pytest.raises(hive.NotFound):
        hive.submit("no.yaml")


def test_another_coordinator_in_the_environment_is_another_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hive.nodes() == []
    monkeypatch.setenv("HIVE_HOME", str(tmp_path / "empty"))
    with pytest.raises(hive.Unreachable, match="no coordinator is known"):
        hive.nodes()


def test_a_program_that_used_it_ends_by_itself(home: Path) -> None:
    code = "import hive\nassert hive.nodes() == []\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_it_is_quick_and_light() -> None:
    code = "import hive, sys\nassert not {'torch', 'numpy', 'rich', 'click'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_public_names_are_fixed() -> None:
    assert sorted(hive.__all__) == [
        "AccessError", "Conflict", "DeadlineExceeded", "Exhausted", "HiveError", "Job", "JobFailed", "NoPlacement",
        "NotFound", "SpecError", "Unreachable", "__version__", "jobs", "nodes", "plan", "submit",
    ]  # fmt: skip
