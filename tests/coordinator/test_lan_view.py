"""What `hive doctor` and `hive nodes --lan` say of the LAN; what the demo says to type where `hive` is not found."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import render, up
from coordinator.doctor import Doctor

PROBLEM = "zeroconf cannot be opened: no multicast here"
BOX = {"name": "box", "address": "10.0.0.7", "cores": 4, "joined": False, "join": "hive-node start"}


def doctor(problem: str, advertise: bool) -> Doctor:
    unused: Any = None
    return Doctor(Path(), unused, unused, unused, unused, lambda: problem, "127.0.0.1:7700", 0.0, advertise)


def test_the_obstacle_is_the_beacons_or_that_it_was_told_not_to_look() -> None:
    assert doctor("", True).lan_obstacle() == ""
    assert doctor(PROBLEM, True).lan_obstacle() == PROBLEM
    assert "--no-advertise" in doctor("", False).lan_obstacle()


def test_nobody_is_only_said_to_be_absent_when_it_was_looked_for() -> None:
    assert render.lan([]) == "no other machines on this LAN announce themselves"
    assert render.lan([], PROBLEM) == PROBLEM


def test_machines_seen_before_a_problem_are_shown_with_it() -> None:
    shown = render.lan([BOX], PROBLEM)
    assert "10.0.0.7" in shown
    assert shown.splitlines()[-1] == PROBLEM
    assert PROBLEM not in render.lan([BOX])


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment's folder with a blank in its name, running us; nothing of it on the path."""
    prefix = tmp_path / "my env"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "activate").touch()
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setenv("PATH", str(tmp_path))
    return prefix


def demo_ended(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    job = {"state": "SUCCEEDED", "metrics": {"accuracy": 0.97}, "nodes": ["local-1"]}
    assert up._told(job, folder, [], 30.0, Path("digits.yaml")) == 0
    return capsys.readouterr().err.partition("what to type next:\n")[2].splitlines()


def test_the_demo_names_the_environment_to_activate_first(
    environment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = demo_ended(tmp_path, capsys)
    assert said[0] == f"  . '{environment}/bin/activate'"
    assert said[1].startswith("  hive up")


def test_nothing_is_to_be_activated_where_hive_is_found(
    environment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hive = tmp_path / "hive"
    hive.touch(mode=0o700)
    assert shutil.which("hive") == str(hive)
    assert demo_ended(tmp_path, capsys)[0].startswith("  hive up")


def test_nothing_is_to_be_activated_outside_an_environment(
    environment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (environment / "bin" / "activate").unlink()
    assert demo_ended(tmp_path, capsys)[0].startswith("  hive up")
