"""`hive models identify` without a coordinator: the table, the document, what a node would add, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from wire import Content, message, packed

from coordinator.cli import model_view
from coordinator.cli.main import cli
from coordinator.model_look import Subject, joined, what_a_node_adds
from protos import documents
from protos.command_line import run
from protos.model import Complexity, Family, LayerProfile, ModelProfile, Requirements


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HIVE_COORDINATOR", "HIVE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HIVE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def identify(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = run(cli, "hive", ["models", "identify", *arguments])
    return code, capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out = identify(capsys, *arguments, "-o", "json")
    assert code == 0, out
    shown: dict[str, Any] = json.loads(out)
    assert shown["schema"] == "hive/v1"
    model: dict[str, Any] = shown["model"]
    return model


def test_weights_are_read_here(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)).state_dict(), here / "w.pt")
    model = document(capsys, "w.pt")
    assert (model["seen_by"], model["hint"], model["source"]) == ("bytes", "", "w.pt")
    assert (model["parameters"], model["family"], model["trainable"]) == (74, "cnn", False)
    code, table = identify(capsys, "w.pt", "--layers", "1")
    assert code == 0 and "74 (small)" in table and "and 1 more" in table and "no: a file of weights" in table


def test_an_entry_point_says_what_a_node_would_add(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "net.py").write_text("raise SystemExit\ndef build():\n    pass\n")
    model = document(capsys, "net.py:build")
    assert model["seen_by"] == "bytes" and "a node would build it" in model["hint"] and "coordinator" in model["hint"]
    assert identify(capsys, "net.py:other")[0] == 3
    assert document(capsys, "net.py")["hint"] == ""


def test_what_nobody_knows_is_no_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "x").write_bytes(b"\x01\x02hive\xff")
    model = document(capsys, "x")
    assert (model["format"], model["confidence"]) == ("unknown", 0.0)
    assert model["notes"] == ["7 bytes, which start with 01 02 68 69 76 65 ff (..hive.)"]


@pytest.mark.parametrize(("name", "code"), [("empty", 3), ("cut", 3), ("missing", 4)])
def test_what_cannot_be_a_model_is_a_typed_error(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, code: int
) -> None:
    (here / "empty").touch()
    (here / "cut").write_bytes(b"PK\x03\x04")
    ended, out = identify(capsys, name, "-o", "json")
    assert ended == code and json.loads(out)["error"]["hint"]


def test_sizes_beyond_any_file_are_refused_and_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    external: tuple[tuple[int, Content], ...] = (13, message((1, "location"), (2, "w.data"))), (14, 1)
    for name, place in (("external", external), ("missing", ())):
        weight = message((1, packed((2**47,) * 32)), (2, 1), (8, "w"), *place)
        (here / name).write_bytes(message((1, 8), (7, message((5, weight))), (8, message((2, 18)))))
        for arguments in ((), ("-o", "json")):
            code = run(cli, "hive", ["models", "identify", name, *arguments])
            written = capsys.readouterr()
            assert code == 3 and "impossible shape" in written.out + written.err
    shown = model_view.model({**documents.plain(profile(bytes=10**400)), "source": "x", "seen_by": "bytes"}, 5)
    assert "over 1 YiB" in shown


def profile(**more: Any) -> ModelProfile:
    layer = LayerProfile("fc\x1b[31m", "Linear", 10, 2e9, 4096.0, 8.0, (3, 4))
    standard: dict[str, Any] = {
        "framework": "pytorch", "format": "hugging_face", "family": Family.MLP, "task": "unknown", "parameters": 10,
        "bytes": 40, "trainable": True, "dtypes": ("F32",), "input_shape": (3, 8), "complexity": Complexity.SMALL,
        "layers": (layer,), "requirements": Requirements(2.0, 1024**3, 0, 0.5, "layers"), "confidence": 1.0,
    }  # fmt: skip
    return ModelProfile(**{**standard, **more})


def test_the_table_shows_work_and_needs_and_no_character_that_a_terminal_obeys() -> None:
    shown = model_view.model({**documents.plain(profile()), "source": "x", "seen_by": "node", "hint": ""}, 5)
    assert "2 GFLOP forward, 4.0 KiB kept for backward" in shown and "(from its layers)" in shown
    assert "(3, 8)" in shown and "3x4" in shown and "\x1b" not in shown


def test_what_was_read_is_believed_before_what_was_built() -> None:
    read = profile(dtypes=("BF16",), bytes=20, parameters=12, task="classification", notes=("read",))
    built = profile(unknown=("task",), notes=("built",))
    both = joined(read, built)
    assert (both.dtypes, both.bytes, both.task, both.unknown) == (("BF16",), 20, "classification", ())
    assert both.parameters == 10 and both.layers == built.layers
    assert both.notes[:2] == ("read", "built") and "12 parameters" in both.notes[2]


def test_a_second_look_is_only_worth_it_where_building_tells_more(tmp_path: Path) -> None:
    assert what_a_node_adds(Subject(tmp_path), profile())
    assert not what_a_node_adds(Subject(tmp_path), profile(trainable=False))
    assert not what_a_node_adds(Subject(tmp_path / "config.json"), profile())
    assert not what_a_node_adds(Subject(tmp_path), profile(format="onnx"))
