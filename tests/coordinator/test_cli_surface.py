"""The surface of `hive`: speed, exit codes, errors as sentences or documents, no heavy imports."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from coordinator.cli import artifacts
from coordinator.cli.main import VERBS, cli
from coordinator.cli.token import lifetime_s
from protos.command_line import LazyGroup, human_bytes, human_seconds, run, table, wants_json, write_line
from protos.errors import ErrorCode, HiveError, NotFound

Home = Path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    for name in list(os.environ):
        if name.startswith("HIVE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HIVE_HOME", str(tmp_path))
    return tmp_path


def test_help_imports_neither_grpc_nor_pydantic_nor_rich_nor_torch() -> None:
    code = (
        "import sys\nfrom coordinator.cli.main import cli\n"
        "try: cli.main(['--help'], prog_name='hive')\nexcept SystemExit: pass\n"
        "heavy = {'grpc', 'pydantic', 'rich', 'torch', 'numpy', 'yaml', 'sqlalchemy', 'cryptography'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_exists_and_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, "hive", [name, "--help"]) == 0
    assert "Usage: hive " + name in capsys.readouterr().out


def test_no_verb_imports_torch() -> None:
    modules = ", ".join(sorted({target.split(":")[0] for target, _ in VERBS.values()}))
    modules += ", coordinator.client, coordinator.local, coordinator.sdk"
    code = f"import sys, {modules}\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, "hive", ["submitt"]) == 2
    captured = capsys.readouterr()
    assert "did you mean 'submit'?" in captured.err
    assert captured.out == ""


def test_no_verb_is_help_and_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, "hive", []) == 2
    assert "Commands:" in capsys.readouterr().err


def test_a_missing_argument_is_a_usage_error_also_as_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, "hive", ["show", "-o", "json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "hive/v1"
    assert document["error"]["code"] == "usage"
    assert document["error"]["hint"] == "see hive show --help"


def test_without_a_coordinator_it_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, "hive", ["ps"]) == 6
    captured = capsys.readouterr()
    assert "no coordinator is known here" in captured.err
    assert "hive coordinator start" in captured.err
    assert captured.out == ""


def test_a_folder_that_cannot_be_written_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Client:
        async def show(self, job: str) -> dict[str, Any]:
            return {"job": {"id": job, "state": "SUCCEEDED", "artifacts": [{"name": "model.safetensors"}]}}

        async def fetch(self, made: list[dict[str, Any]], folder: Path) -> list[Path]:
            folder.mkdir(parents=True)
            return []

    monkeypatch.setattr(artifacts, "connected", lambda work: asyncio.run(work(Client())))
    (tmp_path / "file").touch()
    assert run(cli, "hive", ["artifacts", "get", "j-1", str(tmp_path / "file" / "x")]) == 1
    said = capsys.readouterr().err
    assert "cannot be written: Not a directory" in said and "bug" not in said


def test_a_missing_job_file_is_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, "hive", ["submit", "nope.yaml", "-o", "json"]) == 4
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "not_found"


def test_a_wrong_key_in_the_job_file_is_exit_3_with_the_nearest_key(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    job = home / "job.yaml"
    job.write_text("model: {source: m.py:f}\ndata: {source: 'builtin:digits'}\ntrain: {epoch: 3}\n")
    assert run(cli, "hive", ["submit", str(job)]) == 3
    assert "train.epoch: unknown key; did you mean 'epochs'?" in capsys.readouterr().err


def _failing(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


def test_an_error_of_ours_ends_with_its_exit_code_and_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(_failing(NotFound("no job j-1", "hive ps lists them")), "hive", []) == 4
    assert capsys.readouterr().err == "error: no job j-1\n  hint: hive ps lists them\n"


def test_an_error_of_ours_is_found_inside_a_task_group(capsys: pytest.CaptureFixture[str]) -> None:
    taken = HiveError("port 7700 is taken", code=ErrorCode.PORT_TAKEN)
    assert run(_failing(ExceptionGroup("tasks", [ExceptionGroup("inner", [taken])])), "hive", []) == 1
    assert capsys.readouterr().err == "error: port 7700 is taken\n"


def test_a_bug_shows_its_traceback_only_with_hive_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(_failing(ZeroDivisionError("x")), "hive", []) == 1
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("HIVE_DEBUG", "1")
    assert run(_failing(ZeroDivisionError("x")), "hive", []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_130() -> None:
    assert run(_failing(KeyboardInterrupt()), "hive", []) == 130


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ps", "-o", "json"], True),
        (["ps", "-ojson"], True),
        (["ps", "--output=json"], True),
        (["ps", "--output", "json"], True),
        (["ps", "-o", "table"], False),
        (["show", "json"], False),
        ([], False),
    ],
)
def test_json_is_recognised_even_when_the_rest_cannot_be_parsed(arguments: list[str], expected: bool) -> None:
    assert wants_json(arguments) is expected


def test_a_document_never_holds_nan(capsys: pytest.CaptureFixture[str]) -> None:
    write_line({"loss": float("nan"), "list": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "list": [None, 1.5]}


def test_a_table_aligns_numbers_to_the_right() -> None:
    assert table(["NAME", "N"], [["a", 5], ["bcd", 12], ["e", None]]) == "NAME   N\na      5\nbcd   12\ne      -"


def test_sizes_and_times_are_for_people() -> None:
    assert [human_bytes(n) for n in (0, 2048, 3 * 1024**3)] == ["0 B", "2.0 KiB", "3.0 GiB"]
    assert [human_bytes(n) for n in (10**400, float("inf"))] == ["over 1 YiB"] * 2
    assert [human_seconds(s) for s in (0.0123, 5, 65, 7260)] == ["12.3 ms", "5.0 s", "1 min 05 s", "2 h 01 min"]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 604800)])
def test_lifetimes(text: str, seconds: float) -> None:
    assert lifetime_s(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "7w", "-1h", "0h", "h"])
def test_wrong_lifetimes_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        lifetime_s(text)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_complete_verbs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, "hive", ["completion", shell]) == 0
    assert "_HIVE_COMPLETE" in capsys.readouterr().out


def test_completion_offers_verbs() -> None:
    environment = {**os.environ, "_HIVE_COMPLETE": "bash_complete", "COMP_WORDS": "hive su", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "coordinator.cli.main"], env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.stdout.split(",")[-1].strip() == "submit"


def test_the_lazy_group_lists_commands_without_importing_them() -> None:
    group = LazyGroup("g", lazy={"x": ("module_that_does_not_exist:y", "Help of x.")})
    assert group.list_commands(click.Context(group)) == ["x"]
    assert "Help of x." in group.get_help(click.Context(group))
